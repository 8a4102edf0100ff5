"""What cannot run on several processes says so, before anything hangs."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import afcache
from afcache import CacheConfig, ParallelConfig
from afcache.functional.state import StepRecord
from afcache.models.flux1.checks import check_call
from afcache.parallel.agreement import check_votes
from afcache.parallel.groups import _read


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
    nothing = torch.zeros(1)
    record = StepRecord(nothing > 0, nothing[0] > 0, nothing, nothing, nothing)
    same = record._replace(votes=torch.ones(1, 3, 1, dtype=torch.int64))
    check_votes(same, step=4)
    other = record._replace(votes=torch.tensor([[[1], [1], [0]]]))
    with pytest.raises(RuntimeError, match=r"differently at step 4: .* chose \[1\] .*rank 2 \[0\]"):
        check_votes(other, step=4)


def test_reference_images_are_not_shared_among_the_ranks_of_a_sequence():
    reader: Any = SimpleNamespace(has_context=True)
    with pytest.raises(NotImplementedError, match=r"reference images \(Kontext\) cannot be shared .* Use cfg_degree"):
        check_call(reader, CacheConfig(), shares_sequence=True)
    check_call(reader, CacheConfig(), shares_sequence=False)


def groups_of_xfuser(tensor: int = 1, pipeline: int = 1, ulysses: int = 2) -> Any:
    """What `_read` asks of xfuser's module, in sizes that this process does not have."""
    sequence = SimpleNamespace(world_size=ulysses, ulysses_world_size=ulysses, ring_world_size=1)
    return SimpleNamespace(
        get_tp_group=lambda: SimpleNamespace(world_size=tensor),
        get_pp_group=lambda: SimpleNamespace(world_size=pipeline),
        get_sp_group=lambda: sequence,
        get_cfg_group=lambda: SimpleNamespace(world_size=1),
        get_model_replica_group=lambda: None,
        get_data_parallel_world_size=lambda: 1,
    )


@pytest.mark.parametrize(
    ("sizes", "message"),
    [({"tensor": 2}, "with tensor parallelism over 2 ranks"), ({"pipeline": 4}, r"with pipeline \(pipefusion\) .* 4 ranks")],
)
def test_tensor_and_pipeline_parallelism_are_refused(sizes: dict[str, int], message: str):
    with pytest.raises(NotImplementedError, match=message + ".* not supported under caching"):
        _read(groups_of_xfuser(**sizes), ParallelConfig(ulysses_degree=2))


def test_groups_made_before_must_be_the_ones_asked_for():
    with pytest.raises(
        RuntimeError, match=r"initialised with ulysses_degree 2, ring_degree 1 in this process, .* Pass the same degrees"
    ):
        _read(groups_of_xfuser(), ParallelConfig(ring_degree=2))


def test_an_xfuser_that_cannot_be_imported_names_the_cure(pipe, monkeypatch):
    environment = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "xfuser", None)
    monkeypatch.delitem(sys.modules, "xfuser.core.distributed.parallel_state", raising=False)
    with pytest.raises(RuntimeError, match=r"xfuser, .* could not be imported: .* pip install xfuser.*backend='gloo'"):
        afcache.compile_pipeline(pipe, parallel=ParallelConfig(ring_degree=2))


def test_a_model_that_diffusers_has_shared_out_is_not_shared_out_again(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "_parallel_config", object())
    with pytest.raises(ValueError, match=r"parallel must be None, got .*enable_parallelism has shared the model out already"):
        afcache.compile_pipeline(pipe, parallel=ParallelConfig(cfg_degree=2))


def test_a_model_that_diffusers_has_shared_out_is_no_single_graph(pipe, monkeypatch):
    monkeypatch.setattr(pipe.transformer, "_parallel_config", object())
    with pytest.raises(NotImplementedError, match=r"asks for one graph, and FluxTransformer2DModel shares its work .*'blocks'"):
        afcache.compile_pipeline(pipe, compile="step")
