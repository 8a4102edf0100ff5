"""What goes wrong between ranks is an error that says so, in time, and replicas go their own ways."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import afcache
from afcache import CacheConfig
from afcache.cli.main import main
from tests.support.parallel_cases import ADAPTIVE, Case, draw, make_pipeline
from tests.support.parallel_mishaps import DIFFERENCES, SIZES, SMALL, draw_size

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
ROOT = Path(__file__).parent.parent.parent
SECONDS = 120


def start_by_hand(scenario: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Two ranks as torchrun would start them, that nobody stops when one fails."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.support.parallel_mishaps", scenario, str(folder)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = str(ROOT)
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def run_by_hand(scenario: str, folder: Path, *, survivors: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    """What each survivor met."""
    ranks = start_by_hand(scenario, folder)
    try:
        errors = {rank: ranks[rank].communicate(timeout=SECONDS)[1] for rank in survivors}
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            assert rank.stderr is not None
            rank.stderr.close()
    assert all(ranks[rank].returncode == 0 for rank in survivors), errors
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in survivors]


@pytest.mark.parametrize("scenario", ["killed", "stopped"])
def test_a_lost_rank_is_a_readable_error(scenario: str, tmp_path: Path):
    """A killed rank is noticed at once, one that stands still after the time-out."""
    (met,) = run_by_hand(scenario, tmp_path, survivors=(0,))
    assert met["error"].startswith("rank 0 of 2 lost another rank at step 4: a process has ended, failed or is stuck")


def test_ranks_that_would_divide_the_work_otherwise_are_told(tmp_path: Path):
    for met in run_by_hand("divide otherwise", tmp_path):
        assert met["error"].startswith("rank 0 was given parallel=ParallelConfig(ulysses_degree=1, ring_degree=2, cfg_degree=1")
        assert "and rank 1 ParallelConfig(ulysses_degree=2, ring_degree=1" in met["error"]


def test_votes_that_differ_name_the_step_and_the_ranks(tmp_path: Path):
    for met in run_by_hand("disagree", tmp_path):
        assert met["error"].startswith("ranks decided differently at step 2: rank 0 of the replica chose [1")
        assert "rank 1 [0" in met["error"]


def test_ranks_with_different_work_are_told_what_differs(tmp_path: Path):
    ranks = run_by_hand("otherwise", tmp_path)
    for name in DIFFERENCES:
        for met in ranks:
            assert met["errors"][name].startswith("ranks 0 and 1 were given different ")
            assert name in met["errors"][name]
    # Nothing of it is left for the next image.
    alone = draw(make_pipeline(), SMALL).latents
    for met in ranks:
        torch.testing.assert_close(torch.tensor(met["latents"]), alone, rtol=0, atol=1e-4)


def test_one_compiled_pipeline_draws_several_sizes(tmp_path: Path):
    pipe = make_pipeline()
    afcache.compile_pipeline(pipe, ADAPTIVE, compile=False)
    alone = [draw_size(pipe, height, width) for height, width in SIZES]
    for met in run_by_hand("sizes", tmp_path):
        for latents, expected in zip(met["latents"], alone, strict=True):
            torch.testing.assert_close(torch.tensor(latents), expected, rtol=0, atol=1e-4)
        assert met["graphs"] == 2


def test_replicas_decide_alone(tmp_path: Path):
    ranks = run_by_hand("replicas", tmp_path)
    assert [met["share"] for met in ranks] == [["a", "c"], ["b"]]
    for rank, (met, tolerance) in enumerate(zip(ranks, (0.02, 0.1), strict=True)):
        config = CacheConfig(tolerance=tolerance, warmup_steps=2)
        alone = draw(make_pipeline(), Case(steps=20 + 4 * rank, config=config, backend=None), seed=rank)
        assert [tuple(step) for step in met["decisions"]] == alone.decisions
        assert met["graphs"] == 1
        torch.testing.assert_close(torch.tensor(met["latents"]), alone.latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("flags", [["--ring", "2"], []])
def test_the_command_line_draws_together_and_speaks_once(flags: list[str], tmp_path: Path, capsys):
    """Mini-FLUX has three heads, so ranks share a ring, or its two guidance branches."""
    draws = ["generate", "--no-compile", "--steps", "12", "--prompt", "a handwritten two on a palace", "--output"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "afcache"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    together = tmp_path / "together"
    command = [*torchrun, *draws, str(together), *flags]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.splitlines()[0] == f"2 processes: {'ring' if flags else 'guidance'} 2"
    for line in ("written to", "messages   computed call"):
        assert result.stdout.count(line) == 1
    assert main([*draws, str(tmp_path / "alone")]) == 0
    pictures = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*/a_handwritten_two_on_a_palace_seed0.png"))]
    assert len(pictures) == 2
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 1
