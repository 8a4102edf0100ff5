"""Contenders of compare_compiled: each is what its name says, in a process of its own, and is counted where it happens."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import afcache
from bench.mini_flux.sampling import SETTINGS, draw, prompt_of
from bench.models.random_flux import draw_random, make_pipeline, make_transformer
from bench.race.contender import Contender
from bench.race.contender_process import GAVE_UP, Racer, StepClock, count_evaluations, peak_mib
from bench.race.contenders import contenders
from bench.race.peers import calibrate_magcache
from bench.race.subjects import Task, load

pytestmark = pytest.mark.host
PATTERN = "FF.F..F...F."
TASK = Task("random:tiny", steps=len(PATTERN), patterns={"": PATTERN}, backend="eager")
# Installing cache-dit's cache changes a class of diffusers, so its contenders run in processes of their own.
BY_NAME = {contender.name: contender for contender in contenders()}
IN_PROCESS = [c for c in contenders() if c.force is not None and c.module == "diffusers" and not c.is_compiled]


def test_contenders_have_names_of_their_own_and_say_whether_they_are_compiled():
    assert len(BY_NAME) == len(contenders())
    assert all(
        contender.name.endswith("compiled") for contender in contenders() if contender.is_compiled and contender.kind == "peer"
    )
    assert {c.family for c in contenders() if c.kind == "peer"} == {
        "cache-dit",
        "cache-dit + TaylorSeer",
        "diffusers FirstBlockCache",
        "diffusers TaylorSeer lite",
        "diffusers TaylorSeer",
        "diffusers MagCache",
        "diffusers PyramidAttentionBroadcast",
        "diffusers FasterCache",
        "ParaAttention",
    }


def count(pipe: Any, steps: int = len(PATTERN)) -> list[float]:
    clock = StepClock(pipe.scheduler)
    return count_evaluations(pipe.transformer, clock, steps, lambda: draw_random(pipe, 16, steps=steps))


@pytest.mark.parametrize("contender", IN_PROCESS, ids=lambda c: c.name)
def test_forced_contenders_refresh_where_they_are_told(contender: Contender):
    pipe = make_pipeline(make_transformer(dim=64, double=1, single=2))
    assert contender.force is not None
    contender.force(pipe, PATTERN)
    for _ in range(2):
        assert "".join("F" if share > 0.99 else "." for share in count(pipe)) == PATTERN


@pytest.mark.parametrize("name", ["cache-dit 0.24", "cache-dit + TaylorSeer 0.24, compiled", "AFCache balanced, compiled"])
def test_a_contender_in_its_own_process(name: str, tmp_path: Path):
    racer = Racer(name, TASK, [0, 1], tmp_path / "log", limit=300)
    ready = racer.start()
    assert ready is not None, racer.failure
    assert "".join("F" if share > 0.99 else "." for share in ready.evaluations[0]) == PATTERN
    assert ready.graphs > 0 if "compiled" in name else ready.graphs == 0
    assert ready.graph_breaks == 0 or "cache-dit" in name
    images = [image for seed in (1, 1, 0) if (image := racer.draw(seed)) is not None]
    assert [len(image.step_seconds) for image in images] == [len(PATTERN)] * 3
    assert np.array_equal(images[0].pixels, images[1].pixels)
    assert not np.array_equal(images[0].pixels, images[2].pixels)
    assert images[0].seconds > sum(images[0].step_seconds) > 0
    finished = racer.finish()
    assert finished is not None
    assert finished.peak_mib > 100


def test_what_fails_says_so_and_answers_nothing_more(tmp_path: Path):
    racer = Racer("ParaAttention 0.12", TASK, [0], tmp_path / "log", limit=300)
    assert racer.start() is None
    assert "FluxSingleTransformerBlock.forward() missing" in (racer.failure or "")
    assert racer.draw(0) is None
    assert racer.finish() is None
    slow = Racer("eager", TASK, [0], tmp_path / "slow", limit=0.01)
    assert slow.start() is None
    assert slow.failure == "no answer in 0.01 s"


def test_counted_evaluations_are_the_reports(pipe):
    """Our own count and the hooks' are two ways to the same number."""
    afcache.compile_pipeline(pipe, compile=False)
    scheduler = pipe.scheduler
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    shares = count_evaluations(pipe.transformer, StepClock(pipe.scheduler), 28, lambda: draw(pipe, 3))
    report = afcache.report(pipe)
    assert shares == [1.0 if kind == "F" else 0.0 for kind in report.pattern()]
    assert sum(shares) * 12 == report.block_evaluations


def test_magcaches_own_calibration_is_read_and_agrees_with_ours(pipe):
    options = {"num_inference_steps": 5, **SETTINGS}

    def sample() -> Any:
        return pipe(prompt_of(3), generator=torch.Generator().manual_seed(3), **options)

    ratios = calibrate_magcache(pipe, 5, sample)
    ours = afcache.calibrate_magnitudes(pipe, [prompt_of(3)], generator=torch.Generator().manual_seed(3), **options)
    # Theirs is of the last block's output, after the text was taken off; ours of the whole stack, image tokens.
    assert ratios == pytest.approx(ours, abs=1e-3)


def test_the_clock_times_what_lies_between_the_schedulers_steps(monkeypatch):
    now = iter([0.0, 0.0, 1.0, 1.5, 3.5, 4.0])

    def start(device: torch.device) -> Any:
        assert device.type == "cpu"
        began = next(now)
        return lambda: lambda: next(now) - began

    monkeypatch.setattr("bench.race.contender_process.start_clock", start)
    scheduler = SimpleNamespace(set_begin_index=lambda index: None, step=lambda: "stepped")
    clock = StepClock(scheduler)
    scheduler.set_begin_index(0)
    assert [scheduler.step(), scheduler.step()] == ["stepped", "stepped"]
    assert clock.seconds == [1.0, 2.0]


def test_a_process_tells_its_own_peak_of_memory(tmp_path: Path):
    status = tmp_path / "status"
    status.write_text("Name: python\nVmHWM:\t  2048 kB\n")
    assert peak_mib(status) == 2.0
    assert peak_mib() > 100
    # Some systems say nothing, or have no such file.
    status.write_text("Name: python\n")
    assert peak_mib(status) > 100
    assert peak_mib(tmp_path / "nowhere") > 100


def test_a_limit_of_dynamo_that_is_hit_is_found_in_what_it_prints(monkeypatch):
    """A contender's log is searched for this word."""
    messages: list[str] = []
    monkeypatch.setattr("torch._dynamo.convert_frame.log.warning", lambda message, *values: messages.append(message % values))
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
        for size in (2, 3):
            compiled(torch.ones(size))
    assert [GAVE_UP in message for message in messages] == [True]


def test_random_weights_are_made_in_their_own_precision():
    pipe = load(Task("random:tiny", 4, dtype="bfloat16"))
    assert pipe.transformer.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
