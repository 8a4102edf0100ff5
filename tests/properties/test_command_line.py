"""Command lines at random: they come as far as the model's weights, or end in one line and status 2."""

import string
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

import afcache
from afcache.cli.main import main
from afcache.settings.policies import POLICIES
from afcache.settings.presets import PRESETS
from tests.support.cases import property_test


class LoadedError(Exception):
    """The command got as far as loading weights: nothing was wrong with what can be known before."""


STRANGE = (
    ("", " ", "\n", "-", "--", "-1", "0", "1", "2", "3", "16", "31", "513", "1001", "8193", "9" * 20, "9" * 5000),
    ("1.5", "1e999", "-inf", "nan", "inf", "1_0", "\uff13", "0x10", "true", "None", "é\u2028x", "a\nb", "\udcff", "x" * 5000),
    ("cpu", "cuda", "cuda:0", "cpu:0", "cpu:-1", "cuda:99999999999", "mps", "meta", "cpu\n", "float32", "float64", "fast"),
    ("none", "adaptive", "/", ".", "..", "~", "a/b", "/dev/null", "/no/such", "file", "file/below", "folder", "@file"),
)
WORDS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6),
    st.text(string.printable, max_size=6),
    st.sampled_from([word for words in STRANGE for word in words]),
)
_DRAWING = """prompt model steps seed guidance-scale true-cfg-scale negative-prompt height width max-sequence-length num-images
    dtype device output"""
OPTIONS = {
    "generate": f"{_DRAWING} preset tolerance policy config ulysses ring cfg-parallel".split(),
    "calibrate": f"{_DRAWING} target-speedup target-psnr".split(),
}
FLAGS = ["--no-cache", "--no-compile", "--compare", "--help", "--version", "--", "-h", "-x", "--stepz", "--st", "info"]


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch, tmp_path):
    """Loading ends a command, the hub cannot be reached, and what is written goes to a folder of the test's own."""

    def load(*_: Any) -> None:
        raise LoadedError

    def refuse(model: str, **_: Any) -> dict[str, str]:
        raise OSError(f"cannot reach the hub for {model!r}")

    for command in ("generate", "calibration"):
        monkeypatch.setattr(f"afcache.cli.{command}.load_pipeline", load)
    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", refuse)
    monkeypatch.setattr("afcache.cli.info.collect_info", lambda: {"afcache": afcache.__version__})
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("{}")
    Path("folder").mkdir()


def outcome(capsys, arguments: list[str]) -> str:
    """What became of a command: "loaded", "fine", or its one line of error."""
    # As Python opens the real one: file names need not be text.
    sys.stderr.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = main(arguments)
    except LoadedError:
        capsys.readouterr()
        return "loaded"
    except SystemExit as stop:
        status = stop.code
    errors = capsys.readouterr().err
    if status == 0:
        assert errors == ""
        return "fine"
    assert status == 2
    assert errors.startswith("afcache: error: ")
    assert len(errors.splitlines()) == 1, errors
    return errors


def is_number(text: str, kind: Any = float) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("command", OPTIONS)
@property_test(data=st.data())
def test_commands_at_random_end_in_one_line_or_reach_the_weights(capsys, command, data):
    option = st.sampled_from(OPTIONS[command])
    word = st.one_of(
        st.tuples(option, WORDS).map(lambda pair: [f"--{pair[0]}", pair[1]]),
        st.tuples(option, WORDS).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
        st.sampled_from(FLAGS).map(lambda flag: [flag]),
        WORDS.map(lambda text: [text]),
    )
    arguments = [argument for words in data.draw(st.lists(word, max_size=4)) for argument in words]
    start = data.draw(st.sampled_from([[command], [command, "--no-compile"], []]))
    if command == "calibrate" and start and data.draw(st.booleans()):
        start = [*start, "--target-psnr", "40"]
    assert outcome(capsys, start + arguments)


NOT_A_NUMBER = WORDS.filter(lambda text: not is_number(text))
NOT_AN_INTEGER = WORDS.filter(lambda text: not is_number(text, int))
BELOW_ONE = st.integers(max_value=0).map(str)
BAD = {
    "steps": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(min_value=1001).map(str)),
    "seed": st.one_of(NOT_AN_INTEGER, st.integers(max_value=-1).map(str), st.integers(min_value=2**63).map(str)),
    "height": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(min_value=8193).map(str), st.sampled_from(["1", "30", "33"])),
    "width": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(min_value=8193).map(str), st.sampled_from(["1", "30", "33"])),
    "max-sequence-length": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(min_value=4097).map(str)),
    "num-images": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(min_value=10**6).map(str)),
    "guidance-scale": st.one_of(NOT_A_NUMBER, st.sampled_from(["nan", "inf", "-inf", "-1", "3.5"])),
    "true-cfg-scale": st.one_of(NOT_A_NUMBER, st.floats(max_value=0.99).map(str), st.sampled_from(["nan", "inf"])),
    "tolerance": st.one_of(NOT_A_NUMBER, st.floats(max_value=-1e-9).map(str), st.sampled_from(["nan", "inf", "1e300"])),
    "preset": WORDS.filter(lambda text: text not in PRESETS),
    "policy": WORDS.filter(lambda text: text not in POLICIES),
    "config": WORDS.filter(lambda text: text != "file"),
    "dtype": WORDS.filter(lambda text: text not in ("float32", "bfloat16", "float16")),
    "device": WORDS.filter(lambda text: text not in ("cpu", "cpu:0")),
    "ulysses": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(2, 64).map(str)),
    "ring": st.one_of(NOT_AN_INTEGER, BELOW_ONE, st.integers(2, 64).map(str)),
    "cfg-parallel": st.one_of(NOT_AN_INTEGER, st.integers().filter(lambda n: n != 1).map(str)),
    "output": st.sampled_from(["file", "file/below", "x" * 300, "/dev/null"]),
    "model": WORDS,
}


@pytest.mark.parametrize("option", BAD)
@property_test(data=st.data())
def test_a_bad_value_is_refused_by_the_name_of_its_option_before_weights_are_loaded(capsys, option, data):
    value = data.draw(BAD[option])
    line = outcome(capsys, ["generate", "--no-compile", "--prompt=x", f"--{option}={value}"])
    assert line not in ("loaded", "fine"), value
    assert option in line or (option == "config" and value in line)


@property_test(
    st.fixed_dictionaries(
        {"steps": st.integers(1, 1000), "seed": st.integers(0, 2**63 - 1)},
        optional={
            "height": st.integers(1, 2048).map(lambda n: 4 * n),
            "max-sequence-length": st.integers(1, 512),
            "tolerance": st.floats(0, 1e6),
            "true-cfg-scale": st.floats(1, 100),
            "num-images": st.integers(1, 100),
            "prompt": st.text(st.characters(exclude_characters="\0"), max_size=20),
            "output": st.sampled_from(["folder", "new/below", "é"]),
        },
    )
)
def test_good_values_reach_the_weights(capsys, values):
    arguments = [f"--{name}={value}" for name, value in values.items()]
    assert outcome(capsys, ["generate", "--no-compile", *arguments]) == "loaded"
