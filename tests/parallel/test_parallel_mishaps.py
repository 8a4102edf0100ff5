"""What goes wrong between ranks is an error that says so, in time, and replicas go their own ways."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afcache
from afcache import CacheConfig
from afcache.cli.main import main
from afcache.settings.config import Target
from tests.support.parallel_cases import ADAPTIVE, NOISE, Case, draw, make_pipeline
from tests.support.parallel_layouts import TORCHRUN, Met, run
from tests.support.parallel_mishaps import COMMAND, DIFFERENCES, SIZES, SMALL, draw_size, draw_two

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]
RanksOf = Callable[[str], list[Met]]
on_ulysses, on_ring, on_guidance = (pytest.mark.xdist_group(name) for name in ("ulysses", "ring", "guidance"))


@on_ulysses
def test_a_killed_rank_is_a_readable_error_at_once(ranks_of: RanksOf):
    error = ranks_of("ulysses")[0].stories["killed"]["error"]
    assert error.startswith("rank 0 of 2 lost another rank at step 4: a process has ended, failed or is stuck")


@on_guidance
def test_a_rank_that_stands_still_is_a_readable_error_after_the_time_out(ranks_of: RanksOf):
    error = ranks_of("guidance")[0].stories["stopped"]["error"]
    assert error.startswith("rank 0 of 2 lost another rank at step 4: a process has ended, failed or is stuck")


def test_ranks_that_would_divide_the_work_otherwise_are_told(ranks_of: RanksOf):
    for rank in ranks_of("divided otherwise"):
        error = rank.stories["divide otherwise"]["error"]
        assert error.startswith("rank 0 was given parallel=ParallelConfig(ulysses_degree=1, ring_degree=2, cfg_degree=1")
        assert "and rank 1 ParallelConfig(ulysses_degree=2, ring_degree=1" in error


@on_ulysses
def test_votes_that_differ_name_the_step_and_the_ranks(ranks_of: RanksOf):
    for rank in ranks_of("ulysses"):
        error = rank.stories["disagree"]["error"]
        assert error.startswith("ranks decided differently at step 3: rank 0 of the replica chose [1")
        assert "rank 1 [0" in error


@on_ulysses
def test_ranks_with_different_work_are_told_what_differs(ranks_of: RanksOf):
    # Nothing of it is left for the next image.
    alone = draw(make_pipeline(), SMALL).latents
    for rank in ranks_of("ulysses"):
        met = rank.stories["otherwise"]
        for name in DIFFERENCES:
            assert met["errors"][name].startswith("ranks 0 and 1 were given different ")
            assert name in met["errors"][name]
        torch.testing.assert_close(torch.tensor(met["latents"]), alone, rtol=0, atol=1e-4)


@on_ulysses
@pytest.mark.parametrize(("story", "config"), [("using", ADAPTIVE), ("using, noise", NOISE)], ids=["residual", "noise"])
def test_ranks_draw_each_image_by_its_own_tolerance_which_they_compare(ranks_of: RanksOf, story: str, config: CacheConfig):
    pipe = make_pipeline()
    afcache.compile_pipeline(pipe, config, compile=False)
    alone = draw_two(pipe, [0.0, 0.1])
    assert {(True, True), (True, False)} == set(alone["decisions"])
    for rank in ranks_of("ulysses"):
        met = rank.stories[story]
        assert [tuple(step) for step in met["decisions"]] == alone["decisions"]
        torch.testing.assert_close(torch.tensor(met["latents"]), torch.tensor(alone["latents"]), rtol=0, atol=1e-4)
        assert met["error"].startswith("ranks 0 and 1 were given different settings")


@on_ulysses
def test_one_compiled_pipeline_draws_several_sizes(ranks_of: RanksOf):
    pipe = make_pipeline()
    afcache.compile_pipeline(pipe, ADAPTIVE, compile=False)
    alone = [draw_size(pipe, height, width) for height, width in SIZES]
    for rank in ranks_of("ulysses"):
        met = rank.stories["sizes"]
        for latents, expected in zip(met["latents"], alone, strict=True):
            torch.testing.assert_close(torch.tensor(latents), expected, rtol=0, atol=1e-4)
        assert met["graphs"] == 2


@on_ulysses
def test_ranks_whose_sums_differ_in_the_last_bit_decide_alike(ranks_of: RanksOf):
    first, second = (rank.stories["last bit"] for rank in ranks_of("ulysses"))
    assert first == second
    # The bit matters: where all have it, they decide otherwise; where the second alone has it, it goes by the first.
    assert first["all"]["decisions"] != first["nobody"]["decisions"]
    assert first["all"]["scale"] != first["nobody"]["scale"]
    assert first["one"] == first["nobody"]


@pytest.mark.xdist_group("replicas")
@pytest.mark.parametrize(("story", "target"), [("replicas", "residual"), ("replicas, noise", "noise")])
def test_replicas_decide_alone(ranks_of: RanksOf, story: str, target: Target):
    ranks = [rank.stories[story] for rank in ranks_of("replicas")]
    for rank, (met, tolerance) in enumerate(zip(ranks, (0.02, 0.1), strict=True)):
        config = CacheConfig(tolerance=tolerance, warmup_steps=2, target=target)
        alone = draw(make_pipeline(), Case(steps=20 + 4 * rank, config=config, backend=None), seed=rank)
        assert [tuple(step) for step in met["decisions"]] == alone.decisions
        assert met["graphs"] == 1
        torch.testing.assert_close(torch.tensor(met["latents"]), alone.latents, rtol=0, atol=1e-4)


def assert_drawn_together(said: str, folder: Path, share: str) -> None:
    """One voice, and the picture that one process draws."""
    assert said.splitlines()[0] == f"2 processes: {share} 2"
    for line in ("written to", "messages   computed call"):
        assert said.count(line) == 1
    assert main([*COMMAND, str(folder / "alone")]) == 0
    pictures = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*/a_handwritten_two_on_a_palace_seed0.png"))]
    assert len(pictures) == 2
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1


@on_ring
def test_the_command_line_draws_in_a_ring_and_speaks_once(ranks_of: RanksOf, folder_of: Callable[[str], Path], capsys):
    """Mini-FLUX has three heads, so ranks share a ring, or its two guidance branches."""
    met: list[dict[str, Any]] = [rank.stories["command line"] for rank in ranks_of("ring")]
    assert [rank["status"] for rank in met] == [0, 0]
    assert_drawn_together("".join(rank["said"] for rank in met), folder_of("ring"), "ring")


def test_torchrun_starts_the_command_line_and_it_shares_guidance(tmp_path: Path, capsys):
    result = run([*TORCHRUN, "2", "-m", "afcache", *COMMAND, str(tmp_path / "together")])
    assert result.returncode == 0, result.stderr[-2000:]
    assert_drawn_together(result.stdout, tmp_path, "guidance")
