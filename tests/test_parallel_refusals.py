"""What cannot run on several processes says so, before anything hangs."""

from typing import Any

import pytest
import torch

import afcache
from afcache import ParallelConfig
from afcache.functional.collectives import Ranks
from afcache.functional.parallel import Layout
from afcache.parallel import ParallelContext, check_votes
from afcache.state import StepRecord


def test_a_process_without_torchrun_is_told_the_command(pipe, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match=r"RANK.* not set.*torchrun --nproc-per-node 3 your_script\.py"):
        afcache.compile_pipeline(pipe, parallel=ParallelConfig(ulysses_degree=3))


def test_heads_that_cannot_be_dealt_out_are_refused(pipe):
    with pytest.raises(ValueError, match=r"ulysses_degree must divide .* 3, got 2\. Use one of 1, 3, and ring_degree"):
        afcache.compile_pipeline(pipe, parallel=ParallelConfig(ulysses_degree=2))


def test_degrees_must_make_up_the_processes(pipe, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"number of processes, 4, got .*ring_degree 2.* = 2\..*--nproc-per-node 2"):
        afcache.compile_pipeline(pipe, parallel=ParallelConfig(ring_degree=2))


def test_rings_need_a_kernel_that_tells_its_denominator(pipe):
    pipe.transformer.set_attention_backend("native")
    try:
        with pytest.raises(ValueError, match="ring_degree must be 1 under an attention backend, got 2"):
            afcache.compile_pipeline(pipe, parallel=ParallelConfig(ring_degree=2))
    finally:
        pipe.transformer.reset_attention_backend()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ulysses_degree": 0}, "ulysses_degree"),
        ({"ring_degree": 1.5}, "ring_degree"),
        ({"cfg_degree": 3}, "cfg_degree"),
        ({"data_degree": -1}, "data_degree"),
        ({"backend": "mpi"}, "backend must be None, 'nccl' or 'gloo', got 'mpi'"),
        ({"check_decisions": 1}, "check_decisions"),
        ({"timeout": 0}, "timeout must be finite and between 1 and 86400, got 0"),
    ],
)
def test_bad_degrees_name_the_argument(values: dict[str, Any], message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        ParallelConfig(**values)


def test_parallel_must_be_a_config(pipe):
    wrong: Any = 2
    with pytest.raises(TypeError, match=r"parallel must be an afcache\.ParallelConfig or None, got 2"):
        afcache.compile_pipeline(pipe, parallel=wrong)


def test_ranks_that_decide_differently_are_named():
    context = ParallelContext(Layout(), Ranks(), rank=0, world_size=3, control="")
    nothing = torch.zeros(1)
    record = StepRecord(nothing > 0, nothing[0] > 0, nothing, nothing, nothing)
    same = record._replace(votes=(torch.ones(3, 1, dtype=torch.int64),))
    check_votes(context, same, step=4)
    other = record._replace(votes=(torch.tensor([[1], [1], [0]]),))
    with pytest.raises(RuntimeError, match=r"differently at step 4: .* chose \[1\] .*rank 2 \[0\]"):
        check_votes(context, other, step=4)
