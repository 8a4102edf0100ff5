"""Several processes draw what one draws: real xfuser groups, gloo, torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.parallel_cases import CASES, Drawn, draw, make_pipeline

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]
ROOT = Path(__file__).parent.parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
LAYOUTS = {
    "ulysses": (2, ["--ulysses", "2"]),
    "ring": (2, ["--ring", "2"]),
    "cfg": (2, ["--cfg", "2"]),
    "ulysses and ring": (4, ["--ulysses", "2", "--ring", "2"]),
    "ulysses and cfg": (4, ["--ulysses", "2", "--cfg", "2"]),
    "ring and cfg": (4, ["--ring", "2", "--cfg", "2"]),
}


def torchrun(count: int, *arguments: str, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [*TORCHRUN, str(count), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False)


def draw_together(layout: str, cases: list[str], folder: Path, *options: str) -> list[dict[str, Drawn]]:
    """What every rank drew."""
    count, degrees = LAYOUTS[layout]
    result = torchrun(count, "-m", "tests.support.parallel_worker", str(folder), *cases, *degrees, *options)
    assert result.returncode == 0, result.stderr[-4000:]
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]
    return [{name: Drawn(**fields) for name, fields in rank.items()} for rank in ranks]


@pytest.fixture(scope="module")
def alone() -> dict[str, Drawn]:
    """What one process draws, eagerly; made on demand."""
    return {}


def reference(alone: dict[str, Drawn], name: str) -> Drawn:
    if name not in alone:
        case = CASES[name]._replace(backend=None)
        alone[name] = draw(make_pipeline(case.steered_by), case)
    return alone[name]


def assert_same(alone: dict[str, Drawn], ranks: list[dict[str, Drawn]], name: str, tolerance: float = 1e-4) -> None:
    """Every rank drew the one image, by the one process's decisions, with one graph."""
    expected = reference(alone, name)
    case = CASES[name]
    branches = len(expected.decisions) // case.steps
    leading = expected.decisions[::branches]
    for rank in ranks:
        drawn = rank[name]
        assert (drawn.latents - expected.latents).abs().max() < tolerance
        assert torch.equal(drawn.latents, ranks[0][name].latents)
        own = len(drawn.decisions) // case.steps
        # With cfg parallelism the first step computes every branch, the others one.
        is_split = len(drawn.decisions) % case.steps != 0
        steps = drawn.decisions[branches - 1 :] if is_split else drawn.decisions[::own]
        assert steps == leading
        choices = drawn.choices[branches - 1 :] if is_split else drawn.choices[::own]
        assert choices[1:] == expected.choices[::branches][1:]
        if case.config.policy != "none":
            assert {(True,), (False,)} == set(steps)
        if case.backend:
            assert drawn.graphs == 1
        assert drawn.breaks == 0


TWO_RANKS = [
    "divisible",
    "short text",
    "long text, odd image",
    "odd everything",
    "teacache",
    "first and last blocks",
    "uncached",
]


@pytest.mark.parametrize("layout", ["ulysses", "ring"])
def test_two_ranks_draw_what_one_draws(layout: str, alone: dict[str, Drawn], tmp_path: Path):
    names = [*TWO_RANKS, "guided", "layerwise", "eager", "controlnet", "image prompt"]
    ranks = draw_together(layout, names, tmp_path)
    for name in names:
        assert_same(alone, ranks, name)
    assert {"computed", "attention", "similarity"} <= {choice for step in ranks[0]["layerwise"].choices for choice in step}


def test_guidance_branches_on_two_ranks(alone: dict[str, Drawn], tmp_path: Path):
    names = [
        "guided",
        "teacache, guided",
        "layerwise, guided",
        "controlnet, guided",
        "image prompt, guided",
        "reference image, guided",
    ]
    ranks = draw_together("cfg", names, tmp_path)
    for name in names:
        assert_same(alone, ranks, name)


COUNTED = ["counted", "counted, layerwise", "counted, first and last blocks", "counted, uncached"]


@pytest.mark.parametrize("layout", ["ulysses", "ring", "cfg"])
def test_the_report_counts_every_message(layout: str, tmp_path: Path):
    names = [name for name in COUNTED if layout != "cfg" or CASES[name].cfg > 1]
    for rank in draw_together(layout, names, tmp_path, "--check"):
        for name in names:
            drawn = rank[name]
            sent = [call for call in drawn.counted if call != (0, 0)]
            assert drawn.reported == sent
            # Guidance branches on different ranks exchange nothing within their blocks.
            is_constant = layout == "cfg" or name.endswith("uncached")
            assert (len({collectives for collectives, _ in sent}) == 1) == is_constant


def test_cached_steps_gather_and_sum_statistics_and_nothing_else(tmp_path: Path):
    """In the graph itself: of the adaptive policy, without guidance branches, the velocity's gathering is all there is."""
    for rank in draw_together("ulysses", ["looked into"], tmp_path):
        blocks, per_block, measured_error = 5, 2, 1
        assert rank["looked into"].branches == (1, blocks * per_block + measured_error, 0)
        collectives = {count for count, _ in rank["looked into"].reported}
        assert collectives == {1, 1 + blocks * per_block + measured_error}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ulysses and ring", "ulysses and cfg", "ring and cfg"])
def test_four_ranks_draw_what_one_draws(layout: str, alone: dict[str, Drawn], tmp_path: Path):
    of_ranks = {
        "ulysses and ring": ["odd everything", "long text, odd image", "layerwise, odd"],
        "ulysses and cfg": ["guided"],
        "ring and cfg": ["teacache, guided"],
    }
    names = of_ranks[layout]
    ranks = draw_together(layout, names, tmp_path)
    for name in names:
        assert_same(alone, ranks, name)


@pytest.mark.compile
def test_inductor_on_two_ranks(alone: dict[str, Drawn], tmp_path: Path):
    assert_same(alone, draw_together("ulysses", ["inductor"], tmp_path), "inductor", tolerance=2e-3)


def test_votes_are_counted_when_asked_for(alone: dict[str, Drawn], tmp_path: Path):
    ranks: list[dict[str, Any]] = draw_together("ulysses", ["short text", "layerwise"], tmp_path, "--check")
    for name in ("short text", "layerwise"):
        assert_same(alone, ranks, name)
