"""Video and audio in one call, each on a schedule of its own: both forecast, watched and caught up with over one."""

import math
from typing import Any

import pytest
import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel, UniPCMultistepScheduler
from torch import Tensor

import afcache
from afcache import CacheConfig
from afcache.runtime.binding import require_runtimes
from afcache.runtime.scheduler import check_beside
from tests.support.zoo import minimax_h3
from tests.support.zoo.everything import KINDS, MIXED, STEPS, difference, named
from tests.support.zoo.kind import Kind, draw

pytestmark = pytest.mark.host

ALL = [kind for kind in KINDS if kind.family == minimax_h3.FAMILY]
TEXT = ALL[0]
K = minimax_h3.AUDIO_SHIFT / minimax_h3.SHIFT


@named(ALL)
def test_nothing_restarts_whatever_is_forecast(kind: Kind):
    pipe = kind.make()
    expected = draw(pipe, kind, steps=STEPS)
    for config in (MIXED, None):
        afcache.compile_pipeline(pipe, config, compile=False)
        for seed in (0, 1):
            drawn = draw(pipe, kind, steps=14, seed=seed)
            assert torch.isfinite(drawn).all()
            assert afcache.report(pipe).restarts == ()
            assert {"F", "."} <= set(afcache.report(pipe).pattern())
    assert afcache.report(pipe).correction == "step"
    afcache.restore_pipeline(pipe)
    assert torch.equal(draw(pipe, kind, steps=STEPS), expected)


@named(ALL)
def test_conditions_are_no_part_of_the_sample(kind: Kind):
    pipe = kind.make()
    afcache.compile_pipeline(pipe, compile=False)
    drawn = draw(pipe, kind, steps=STEPS)
    trajectories = [runtime.last_trajectory(pipe) for runtime in require_runtimes(pipe)]
    assert [each.shape for each in trajectories if each is not None] == [(1, drawn.numel())]


def test_blocks_compiled_alone_forecast_the_same():
    pipe = minimax_h3.make_text()
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    expected = draw(pipe, TEXT, steps=STEPS)
    afcache.compile_pipeline(pipe, MIXED, compile="blocks", backend="eager")
    assert difference(draw(pipe, TEXT, steps=STEPS), expected) <= 1e-4
    assert afcache.report(pipe).restarts == ()


def test_outputs_have_names_for_those_who_ask():
    pipe = minimax_h3.make_text()
    expected = draw(pipe, TEXT, steps=4)
    afcache.compile_pipeline(pipe, tolerance=0.0, compile=False)

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "return_dict": True}

    def unpack(module: Any, args: Any, output: Any) -> Any:
        return output.sample, output.audio_sample

    hooks = [pipe.transformer.register_forward_pre_hook(ask, with_kwargs=True), pipe.transformer.register_forward_hook(unpack)]
    assert difference(draw(pipe, TEXT, steps=4), expected) <= 1e-4
    for hook in hooks:
        hook.remove()


class Field(MiniMaxH3Transformer3DModel):
    """A transformer whose velocities are known."""

    def forward(
        self,
        hidden_states: Tensor,
        audio_hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        timestep_indices: Tensor,
        token_tags: Tensor,
        position_ids: Tensor,
        video_indices: Tensor,
        audio_indices: Tensor,
        text_indices: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor, Tensor]:
        s, u = (1 - timestep[timestep_indices[indices[-1]]] for indices in (video_indices, audio_indices))
        # The scheduler's velocities are those that the model returns, turned round.
        return -self.video(s, hidden_states), -self.audio(s, u, audio_hidden_states)

    def video(self, s: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def audio(self, s: Tensor, u: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError


class Straight(Field):
    """Both lead to one picture, along straight lines."""

    def video(self, s: Tensor, x: Tensor) -> Tensor:
        return (x - 0.5) / s

    def audio(self, s: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return (x + 0.5) / u


class Bent(Field):
    """Over the video's noise levels both velocities are linear in the level: the error of one that is reused grows with it."""

    def video(self, s: Tensor, x: Tensor) -> Tensor:
        return _wave(x) * (1 + 2 * s)

    def audio(self, s: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return (_wave(x) * (2 - 3 * s) - (K - 1) * x) * (1 - (1 - K) * s) / K


def _wave(x: Tensor) -> Tensor:
    return torch.arange(x.numel()).reshape(x.shape).sin()


def test_straight_paths_of_both_are_forecast_without_an_error():
    pipe = minimax_h3.make("transformer", kind=Straight)
    afcache.compile_pipeline(pipe, MIXED, compile=False)
    draw(pipe, TEXT, steps=12)
    measured = [error for step in afcache.report(pipe).steps for error in step.measured_error if not math.isnan(error)]
    assert len(measured) >= 4
    assert max(measured) <= 1e-3


def test_catching_up_is_exact_for_both_where_errors_grow_as_their_law_says():
    pipe = minimax_h3.make("transformer", kind=Bent)
    expected = draw(pipe, TEXT, steps=12)
    how = {"target": "velocity", "policy": "fixed", "interval": 3, "warmup_steps": 1, "order": 0, "refresh_last_step": True}
    afcache.compile_pipeline(pipe, CacheConfig(error_law="remainder", **how), compile=False)
    assert difference(draw(pipe, TEXT, steps=12), expected) <= 1e-4
    assert "." in afcache.report(pipe).pattern()
    assert afcache.report(pipe).restarts == ()
    afcache.compile_pipeline(pipe, CacheConfig(correction=False, **how), compile=False)
    assert difference(draw(pipe, TEXT, steps=12), expected) > 1e-2


def test_another_scheduler_of_the_audio_is_refused_unless_every_step_is_computed():
    pipe = minimax_h3.make_text()
    afcache.compile_pipeline(pipe, compile=False)
    draw(pipe, TEXT, steps=4)
    pipe.audio_scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(
        NotImplementedError,
        match=r"audio_scheduler is a UniPCMultistepScheduler of \d steps beside scheduler MiniMaxH3Scheduler of \d steps",
    ):
        draw(pipe, TEXT, steps=4)
    afcache.restore_pipeline(pipe)
    expected = draw(pipe, TEXT, steps=4)
    afcache.compile_pipeline(pipe, afcache.policy("none"), compile=False)
    torch.testing.assert_close(draw(pipe, TEXT, steps=4), expected, rtol=0, atol=1e-4)


def test_two_schedules_have_as_many_steps():
    scheduler, beside = MiniMaxH3Scheduler(), MiniMaxH3Scheduler()
    scheduler.set_timesteps(8)
    beside.set_timesteps(8)
    check_beside("audio_scheduler", beside, scheduler)
    beside.set_timesteps(7)
    with pytest.raises(NotImplementedError, match=r"of 6 steps beside .* of 7 steps; .* as many"):
        check_beside("audio_scheduler", beside, scheduler)
    with pytest.raises(NotImplementedError, match="audio_scheduler is missing"):
        check_beside("audio_scheduler", None, scheduler)
