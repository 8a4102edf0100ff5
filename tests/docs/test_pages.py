"""Every code block of README and docs/ runs; every command's own parser takes it.

FLUX.1-dev is answered by a few of mini-FLUX's blocks, on a CPU and eagerly, by other defaults: what a page says is not changed.
"""

import argparse
import functools
import importlib
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel

import afcache
from afcache.cli.arguments import build_parser
from bench.readme_numbers import PAGES
from tests.docs.pages import ROOT, blocks, inline_commands, name_of, shell_lines

FLUX_DEV = "black-forest-labs/FLUX.1-dev"
SEVERAL = ROOT / "docs" / "several-gpus.md"
PROGRAMS = [page for page in PAGES if blocks(page, "python") and page != SEVERAL]
COMMANDS = [(page, words) for page in PAGES for words in (*shell_lines(page), *inline_commands(page))]


class ParsedError(Exception):
    """A command's parser took its arguments."""


@pytest.fixture
def stand_in(monkeypatch, tmp_path: Path) -> None:
    """Four of mini-FLUX's blocks for every FLUX, on the CPU, with short texts, compiled by nothing that takes long."""
    load_pipeline, load_transformer = FluxPipeline.from_pretrained, FluxTransformer2DModel.from_pretrained
    call, compiles = FluxPipeline.__call__, torch.compile

    def load(name: Any, **options: Any) -> Any:
        if name != FLUX_DEV:
            return load_pipeline(name, **options)
        assert options == {"dtype": torch.bfloat16}
        pipe = afcache.load_mini_flux()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def load_few_blocks(*arguments: Any, **options: Any) -> Any:
        transformer = load_transformer(*arguments, **options)
        transformer.transformer_blocks = transformer.transformer_blocks[:2]
        transformer.single_transformer_blocks = transformer.single_transformer_blocks[:2]
        return transformer

    def move(self: Any, device: str) -> Any:
        assert device.split(":")[0] == "cuda"
        return self

    monkeypatch.setattr(FluxPipeline, "from_pretrained", load)
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", load_few_blocks)
    monkeypatch.setattr(FluxPipeline, "__call__", functools.partialmethod(call, max_sequence_length=16))
    monkeypatch.setattr(DiffusionPipeline, "to", move)
    monkeypatch.setitem(afcache.compile_pipeline.__kwdefaults__, "compile", False)
    monkeypatch.setitem(afcache.calibrate.__kwdefaults__, "progress", False)
    monkeypatch.setattr(torch, "compile", functools.partial(compiles, backend="eager"))
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.chdir(tmp_path)


@pytest.mark.host
@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("page", PROGRAMS, ids=name_of)
def test_the_programs_of_a_page_run_one_after_the_other(page: Path, capsys):
    run_programs(page)
    assert re.search(r"F[F.]{3,}", capsys.readouterr().out)


@pytest.mark.host
@pytest.mark.usefixtures("stand_in")
def test_the_program_for_several_gpus_asks_for_its_processes(monkeypatch):
    """In one process it comes as far as connecting with the others."""
    load = afcache.load_mini_flux

    def load_with_heads_enough() -> Any:
        pipe = load()
        pipe.transformer.register_to_config(num_attention_heads=24)
        return pipe

    monkeypatch.setattr(afcache, "load_mini_flux", load_with_heads_enough)
    with pytest.raises(RuntimeError, match=r"torchrun --nproc-per-node 2 your_script\.py"):
        run_programs(SEVERAL)


def run_programs(page: Path) -> None:
    """All python blocks of a page in one namespace."""
    exec(compile("\n".join(blocks(page, "python")), name_of(page), "exec"), {})


def test_the_same_ten_lines_begin_on_readme_and_in_usage():
    readme, usage = (blocks(page, "python")[0] for page in (ROOT / "README.md", ROOT / "docs" / "usage.md"))
    assert readme.splitlines()[:6] == usage.splitlines()[:6]
    assert len(readme.splitlines()) <= 12


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{name_of(page)}: {' '.join(words)}" for page, words in COMMANDS])
def test_a_command_exists_and_its_parser_takes_its_arguments(page: Path, words: list[str], monkeypatch):
    assert page in PAGES
    assert takes(words, monkeypatch), words


def takes(words: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a command line names something that is here, and is understood by it."""
    program, *arguments = words
    if program == "afcache":
        return bool(build_parser().parse_args(arguments).command)
    if program == "pip":
        return installs(arguments)
    if program == "./run_afcache.sh":
        source = (ROOT / "run_afcache.sh").read_text()
        if arguments[:1] == ["serve"]:
            return '"${1:-}" = serve' in source and bool(build_parser().parse_args(arguments).command)
        if arguments[:1] == ["--nproc"]:
            assert "--nproc)" in source
            arguments = arguments[2:]
        return "afcache generate --compare" in source and bool(build_parser().parse_args(["generate", "--compare", *arguments]))
    if program == "./run_tests.sh":
        options = [argument for argument in arguments if argument.startswith("--")]
        sources = (ROOT / "run_tests.sh").read_text() + (ROOT / "tests" / "conftest.py").read_text()
        return all(option in sources for option in options)
    if program == "torchrun":
        return starts(arguments)
    assert program == "python"
    is_module = arguments[0] == "-m"
    module = arguments[1] if is_module else arguments[0].removesuffix(".py").replace("/", ".")
    return runs(module, arguments[2:] if is_module else arguments[1:], monkeypatch)


def installs(arguments: list[str]) -> bool:
    """`pip install` from a clone: the extras are declared, and the constraints are here."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert arguments[:3] == ["install", "-c", "constraints.txt"]
    assert (ROOT / "constraints.txt").is_file()
    what = re.fullmatch(r"\.(?:\[([\w,]+)\])?", arguments[-1])
    assert what
    return set((what[1] or "").split(",")) - {""} <= set(declared) and set(arguments[3:-1]) <= {"-e"}


def starts(arguments: list[str]) -> bool:
    """`torchrun`: its parser takes what is its own, and afcache's the rest."""
    from torch.distributed.run import get_args_parser

    given = get_args_parser().parse_args(arguments)
    if given.training_script == "your_script.py":
        return True
    assert (given.module, given.training_script) == (True, "afcache")
    return bool(build_parser().parse_args(given.training_script_args).command)


def runs(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> bool:
    """A benchmark: it is here, and its own parser, if it has one, takes the arguments."""
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert source.is_file(), module
    if "ArgumentParser" not in source.read_text():
        return not arguments
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise ParsedError

    monkeypatch.setattr(sys, "argv", [str(source), *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()
    return True
