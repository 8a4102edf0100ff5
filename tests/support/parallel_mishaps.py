"""What goes wrong between ranks, or goes its own way: each story is told by all ranks of a layout, and returns what it met."""

import contextlib
import dataclasses
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import afcache
from afcache import CacheConfig, ParallelConfig
from afcache.cli.main import main
from afcache.functional.ranks import step as parallel_step
from afcache.runtime import guidance
from afcache.settings.config import Target
from tests.support.parallel_cases import ADAPTIVE, NOISE, Case, draw, make_pipeline
from tests.support.parallel_hosts import draw_shared, draw_wrapped

RANK = int(os.environ.get("RANK", "0"))
PAIR = ParallelConfig(ulysses_degree=2, backend="gloo", timeout=10)
BRANCHES = ParallelConfig(cfg_degree=2, backend="gloo", timeout=10)
COMMAND = ["generate", "--no-compile", "--steps", "12", "--prompt", "a handwritten two on a palace", "--output"]
SIZES = [(32, 32), (28, 20), (32, 32)]
SMALL = Case(backend=None, steps=8, cfg=2.0)
# What rank 1 does otherwise than rank 0, and what the error should call it.
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prompts": ({}, {"prompt": "a three"}),
    "seeds": ({}, {"seed": 1}),
    "step counts": ({"steps": 9}, {}),
    "image sizes": ({"height": 36, "width": 28}, {}),
    "true_cfg_scale, callbacks": ({"cfg": 3.0}, {}),
    "numbers of guidance branches": ({"cfg": 1.0}, {}),
    "ControlNets": ({"steered_by": "controlnet"}, {}),
    "adapters": ({"steered_by": "adapter"}, {}),
    "settings": ({"config": CacheConfig(tolerance=0.03, warmup_steps=2)}, {}),
}


def draw_otherwise() -> dict[str, Any]:
    """Ranks of one group that are given different work; then the same."""
    met = {}
    for name, (changes, arguments) in DIFFERENCES.items():
        case = SMALL._replace(**changes) if RANK else SMALL
        try:
            draw(make_pipeline(case.steered_by), case, PAIR, **arguments if RANK else {})
            met[name] = "nothing"
        except RuntimeError as error:
            met[name] = str(error)
    return {"errors": met, "latents": draw(make_pipeline(), SMALL, PAIR).latents.tolist()}


def draw_sizes() -> dict[str, Any]:
    """Several sizes with one compiled pipeline."""
    pipe = make_pipeline()
    # Without the short time-out: ranks may compile for longer than each other.
    afcache.compile_pipeline(pipe, ADAPTIVE, parallel=dataclasses.replace(PAIR, timeout=None), backend="eager")
    torch._dynamo.utils.counters.clear()
    latents = [draw_size(pipe, height, width).tolist() for height, width in SIZES]
    return {"latents": latents, "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def draw_size(pipe: Any, height: int, width: int) -> torch.Tensor:
    """One image of eight steps."""
    size = {"height": height, "width": width, "max_sequence_length": 5, "num_inference_steps": 8}
    return pipe("a two", **size, generator=torch.Generator().manual_seed(0), output_type="latent").images


def draw_using(config: CacheConfig) -> dict[str, Any]:
    """A tolerance for each of two images, the same on both ranks; then another one on rank 1."""
    pipe = make_pipeline()
    afcache.compile_pipeline(pipe, config, parallel=PAIR, compile=False)
    drawn = draw_two(pipe, [0.0, 0.1])
    try:
        draw_two(pipe, 0.1 if RANK else 0.2)
    except RuntimeError as error:
        return {**drawn, "error": str(error)}
    return {**drawn, "error": "nothing"}


def draw_two(pipe: Any, tolerance: float | list[float]) -> dict[str, Any]:
    """A batch of two images, of twelve steps."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    options = {"height": 32, "width": 32, "max_sequence_length": 5, "num_inference_steps": 12, "output_type": "latent"}
    with afcache.using(pipe, tolerance=tolerance):
        latents = pipe(["a two", "a three"], generator=generators, **options).images
    return {"latents": latents.tolist(), "decisions": [step.refreshed for step in afcache.report(pipe).steps]}


def draw_replicas(target: Target) -> dict[str, Any]:
    """Replicas with images, lengths and decisions of their own."""
    parallel = ParallelConfig(data_degree=2, backend="gloo")
    pipe = make_pipeline()
    tolerance = 0.02 if RANK == 0 else 0.1
    config = CacheConfig(tolerance=tolerance, warmup_steps=2, target=target)
    drawn = draw(pipe, Case(steps=20 + 4 * RANK, config=config), parallel, seed=RANK)
    return {"latents": drawn.latents.tolist(), "decisions": drawn.decisions, "graphs": drawn.graphs}


def draw_in_doubt() -> dict[str, Any]:
    """A tolerance between what an error and the next larger number lead to; nobody has the latter, or rank 1, or all."""
    estimates = {who: draw_off(who, ADAPTIVE.tolerance)["estimates"] for who in ((), (0, 1))}
    tolerance = between(*estimates.values())
    return {"nobody": draw_off((), tolerance), "one": draw_off((1,), tolerance), "all": draw_off((0, 1), tolerance)}


def draw_off(who: tuple[int, ...], tolerance: float) -> dict[str, Any]:
    """An image whose errors and guidance scale are found to be the next larger number by some ranks."""
    exchange_of, guidance_of_step = parallel_step.exchange_of_wholes, guidance.guidance_of_step

    def larger(x: torch.Tensor) -> torch.Tensor:
        return torch.nextafter(x, x + 1) if RANK in who else x

    def exchange(layout: Any) -> Any:
        exchange = exchange_of(layout)
        return exchange._replace(adopt_error=lambda error: exchange.adopt_error(larger(error)))

    pipe = make_pipeline()
    case = SMALL._replace(steps=20, config=dataclasses.replace(NOISE, tolerance=tolerance))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_step, "exchange_of_wholes", exchange)
        patch.setattr(guidance, "guidance_of_step", lambda *args, **kwargs: larger(guidance_of_step(*args, **kwargs)))
        drawn = draw(pipe, case, PAIR)
    report = afcache.report(pipe)
    estimates = [step.estimated_error[0] for step in report.steps if step.branch == 0]
    found = {"scale": report.guidance_scale, "estimates": estimates, "decisions": drawn.decisions}
    return {**found, "latents": drawn.latents.tolist()}


def between(first: list[float], second: list[float]) -> float:
    """A tolerance that one run's estimate reaches and the other's does not, at the last step that allows for one.

    All estimates before that step are smaller, so that both runs are the same until then.
    """
    pairs = [sorted(pair) for pair in zip(first, second, strict=True)]
    largest = [max(high for _, high in [[0.0, 0.0], *pairs[:step]]) for step in range(len(pairs))]
    return [high for (low, high), before in zip(pairs, largest, strict=True) if before <= low < high][-1]


def divide_otherwise() -> dict[str, Any]:
    """Ranks that would make groups of different degrees."""
    degrees: dict[str, Any] = {"ulysses_degree": 2} if RANK else {"ring_degree": 2}
    try:
        draw(make_pipeline(), SMALL, ParallelConfig(**degrees, backend="gloo", timeout=10))
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "nothing"}


def disagree() -> dict[str, Any]:
    """Rank 1 votes to compute every step, whatever the sums say."""
    exchange_of = parallel_step.exchange_of

    def contrary(layout: Any, lengths: Any) -> Any:
        exchange = exchange_of(layout, lengths)
        return exchange._replace(agree=lambda choice: exchange.agree(torch.zeros_like(choice) if RANK else choice))

    parallel_step.exchange_of = contrary
    try:
        draw(make_pipeline(), SMALL, dataclasses.replace(PAIR, check_decisions=True))
    except RuntimeError as error:
        return {"error": str(error)}
    finally:
        parallel_step.exchange_of = exchange_of
    return {"error": "nothing"}


def lose_a_rank(how: signal.Signals, parallel: ParallelConfig) -> dict[str, Any]:
    """Rank 1 is killed, or stopped, within an image."""
    pipe = make_pipeline()
    afcache.compile_pipeline(pipe, ADAPTIVE, parallel=parallel, compile=False)
    guided: dict[str, Any] = {"true_cfg_scale": 2.0, "negative_prompt": ""} if parallel.cfg_degree > 1 else {}
    size: dict[str, Any] = {"num_inference_steps": 8, "max_sequence_length": 8, "output_type": "latent", **guided}

    def strike(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if RANK == 1 and step == 3:
            os.kill(os.getpid(), how)
        return tensors

    try:
        pipe("a two", callback_on_step_end=strike, **size)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "nothing"}


def draw_by_command(folder: Path) -> dict[str, Any]:
    """The command line, in ranks that are there already."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = main([*COMMAND, str(folder / "together"), "--ring", "2"])
    return {"status": status, "said": said.getvalue()}


STORIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "otherwise": lambda _: draw_otherwise(),
    "using": lambda _: draw_using(ADAPTIVE),
    "using, noise": lambda _: draw_using(NOISE),
    "replicas": lambda _: draw_replicas("residual"),
    "replicas, noise": lambda _: draw_replicas("noise"),
    "last bit": lambda _: draw_in_doubt(),
    "sizes": lambda _: draw_sizes(),
    "divide otherwise": lambda _: divide_otherwise(),
    "disagree": lambda _: disagree(),
    "killed": lambda _: lose_a_rank(signal.SIGKILL, PAIR),
    "stopped": lambda _: lose_a_rank(signal.SIGSTOP, BRANCHES),
    "command line": draw_by_command,
    "diffusers, ulysses": lambda _: draw_shared("ulysses"),
    "diffusers, ring": lambda _: draw_shared("ring"),
    "xfuser": lambda _: draw_wrapped(),
}
