"""The soak, in small and eagerly: no tensor is left over, no state is stale."""

import random

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

import afcache
from bench.mini_flux import sampling
from bench.soak import PROBE, Task, _live_tensors, draw, plot, random_task, soak, summarise


@pytest.fixture(scope="module")
def rows():
    pipe = afcache.compile_pipeline(sampling.load(), compile=False)
    return soak(pipe, 21, probe_every=5, progress=False)


def test_memory_and_images_stay_the_same(rows):
    probes = [row for row in rows if row["is_probe"]]
    assert len({row["tensors"] for row in probes[1:]}) == 1
    assert len({row["tensor_bytes"] for row in probes[1:]}) == 1
    assert all(row["difference"] == 0 and row["same_decisions"] for row in probes)
    assert rows[-1]["graphs"] == rows[0]["graphs"]


def test_tensors_of_a_compilers_traces_are_not_counted():
    before = _live_tensors()
    kept = torch.ones(1000)
    with FakeTensorMode():
        traced = torch.ones(1000)
    after = _live_tensors()
    assert isinstance(traced, FakeTensor)
    assert after["tensors"] - before["tensors"] == 1
    assert after["tensor_bytes"] - before["tensor_bytes"] == 4 * kept.numel()


def test_the_summary_tells_of_every_quarter_and_is_drawn(rows, tmp_path):
    summary = summarise(rows)
    assert [row["images"] for row in summary] == ["0 to 4", "5 to 9", "10 to 14", "15 to 19"]
    assert summary[-1]["probes' largest difference"] == 0
    plot(rows, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000


def test_tasks_change_everything():
    source = random.Random(0)
    tasks = [random_task(source) for _ in range(200)]
    for field in ("steps", "size", "batch", "cfg"):
        assert len({getattr(task, field) for task in tasks}) > 1
    assert 10 < sum(task.aborted_at is not None for task in tasks) < 40
    assert sum(task.interrupted_at is not None for task in tasks) > 5


def test_the_probe_sees_other_noise_and_tasks_end_where_they_should():
    pipe = afcache.compile_pipeline(sampling.load(), compile=False)
    first, other = draw(pipe, PROBE), draw(pipe, PROBE._replace(seed=8))
    assert first is not None
    assert other is not None
    assert np.abs(first - other).max() > 0.1
    assert draw(pipe, Task(seed=1, aborted_at=3)) is None
    assert draw(pipe, Task(seed=1, cfg=1.0, interrupted_at=3)) is not None
    assert len(afcache.report(pipe).steps) == 4
