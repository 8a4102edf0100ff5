"""Requests that began at different times share a call, and draw what each of them draws alone."""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import afcache
from afcache import CacheConfig, CacheState
from afcache.functional.plans import schedule_steps
from afcache.functional.state import StepSchedule
from afcache.models.families import family_of
from afcache.sampling.loop import Step
from afcache.sampling.loop import prepare as set_out
from bench.mini_flux.sampling import Prepared, prepare
from tests.support.sampling import ADAPTIVE, largest_difference, page_example

pytestmark = pytest.mark.host
# Seed, steps, tolerance.
REQUESTS = [(0, 12, 0.02), (1, 20, 0.005), (2, 9, 0.05), (3, 16, 0.02), (4, 14, 0.1)]


class Request(NamedTuple):
    """One image on its way."""

    number: int
    inputs: tuple[afcache.FluxInputs, ...]
    steps: list[StepSchedule]
    scale: Tensor
    latents: Tensor
    states: tuple[CacheState, ...]
    pattern: str = ""


def ask(pipe: Any, number: int, problem: Prepared, config: CacheConfig) -> Request:
    inputs, *others = problem.branches
    given = inputs, others[0] if others else None
    journey = set_out(pipe.transformer, given, problem.sigmas, guidance_scale=problem.cfg, config=config)
    steps = schedule_steps(problem.sigmas, config)
    return Request(number, journey.branches, steps, journey.guidance_scale, journey.start.latents, journey.start.states)


def serve(pipe: Any, waiting: list[Request], *, step: Step, slots: int) -> dict[int, Request]:
    """All of them, some at a time, always as many; who comes next takes the place of who is done."""
    served: dict[int, Request] = {}
    running, waiting = waiting[:slots], waiting[slots:]
    while any(request.number not in served for request in running):
        running = _together(pipe, running, step)
        for slot, request in enumerate(running):
            if len(request.pattern) == len(request.steps):
                served[request.number] = request
                # Where nobody waits, a copy of a neighbour keeps the batch as it is.
                left = waiting[:1] or [each for each in running if each.number not in served][:1] or [request]
                running[slot], waiting = left[0], waiting[1:]
        if all(len(request.pattern) == len(request.steps) for request in running):
            break
    return served


def _together(pipe: Any, running: list[Request], step: Step) -> list[Request]:
    family = family_of(pipe.transformer)
    assert family is not None
    branches = tuple(afcache.stack_samples(branch) for branch in zip(*(request.inputs for request in running), strict=True))
    states = tuple(afcache.stack_samples(branch) for branch in zip(*(request.states for request in running), strict=True))
    latents, states, records = step(
        pipe.transformer,
        branches,
        torch.cat([request.latents for request in running]),
        states,
        afcache.stack_schedules([request.steps[len(request.pattern)] for request in running]),
        torch.cat([request.scale for request in running]),
        architecture=family.architecture,
        kernel=family.attention_kernel(pipe.transformer),
        config=ADAPTIVE,
    )
    return [
        request._replace(
            latents=latents[index : index + 1].clone(),
            states=tuple(afcache.take_samples(state, [index]) for state in states),
            pattern=request.pattern + ("F" if records[0].refresh[index] else "."),
        )
        for index, request in enumerate(running)
    ]


@pytest.mark.parametrize(("cfg", "is_compiled"), [(1.0, False), (2.0, False), (1.0, True)])
@torch.no_grad()
def test_a_request_is_what_it_is_alone(pipe, short, cfg: float, is_compiled: bool):
    host = short if is_compiled else pipe
    step = torch.compile(afcache.denoising_step, fullgraph=True, backend="aot_eager") if is_compiled else afcache.denoising_step
    waiting, alone = [], []
    for number, (seed, steps, tolerance) in enumerate(REQUESTS):
        config = dataclasses.replace(ADAPTIVE, tolerance=tolerance)
        scale = cfg + 0.5 * number if cfg > 1 else 1.0
        problem = prepare(host, [seed], steps=steps, cfg=scale)
        waiting.append(ask(host, number, problem, config))
        inputs, *others = problem.branches
        alone.append(
            afcache.denoise(
                host.transformer,
                inputs,
                problem.sigmas,
                negative=others[0] if others else None,
                guidance_scale=scale,
                config=config,
            )
        )
    served = serve(host, waiting, step=step, slots=3)
    assert sorted(served) == list(range(len(REQUESTS)))
    for number, expected in enumerate(alone):
        assert served[number].pattern == expected.pattern()
        assert "." in expected.pattern()
        assert largest_difference(served[number].latents.numpy(), expected.latents.numpy()) < 1e-4
    if is_compiled:
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]


def test_the_pages_requests_run():
    given, _ = page_example("torch.compile(afcache.denoising_step").split("step = torch.compile")
    scope: dict[str, Any] = {}
    exec(given + "sigmas = torch.linspace(1, 0, 29)\n" + page_example("afcache.stack_schedules("), scope)
    assert len(scope["early"]) > len(scope["late"])
    # The second has arrived at a noise level where the first is still on its way.
    assert scope["state"].trail.sigma.tolist() == pytest.approx([1 - 20 / 28, 0.0], abs=1e-6)
    assert scope["left"].num_nodes.shape == (1,)
