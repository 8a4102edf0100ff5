"""What the history keeps: exact on closed forms, there and back to rounding, for latents of any rank."""

import dataclasses

import pytest
import torch
from torch import Tensor

import afcache
from afcache import CacheConfig
from afcache.functional.forecast import apply_row, push
from afcache.functional.initial import empty_state, shape_of
from afcache.functional.model import Sizes
from afcache.functional.target import NOISE_LEVEL, keep_output, keep_residual, release_output, release_residual
from afcache.settings.presets import tuned
from tests.support.toy import LATENTS, SIGMAS, euler, mixture_flow, polynomial_in_sigma, run, sample_toy

SHAPES = [(2, 3, 4), (2, 4, 5, 6), (1, 3, 2, 4, 5)]
LEVELS = [1.0, 0.7, 0.003, 0.0]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("target", ["velocity", "noise"])
@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_a_velocity_comes_back_as_it_was(target, sigma: float, dtype: torch.dtype, shape: tuple[int, ...]):
    x, v, level = noise(*shape, dtype=dtype), noise(*shape, seed=1, dtype=dtype), torch.tensor(sigma)
    kept = keep_output(v, x, level, target=target)
    assert kept.dtype == torch.float32
    back = release_output(kept, x.float(), level, target=target)
    assert float((back - v.float()).norm() / v.float().norm()) < 1e-6
    assert torch.equal(release_output(kept, x, level, target=target), v) or dtype == torch.float32


def test_what_is_kept_is_memory_of_its_own():
    v = noise(2, 3, 4)
    assert keep_output(v, v, torch.tensor(0.5), target="velocity").data_ptr() != v.data_ptr()


def test_residuals_come_back_as_they_were():
    start, tokens = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    torch.testing.assert_close(release_residual(keep_residual(tokens, start), start), tokens)


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=len)
def test_noise_is_constant_along_a_straight_path(sigma: float, shape: tuple[int, ...]):
    """x = (1 - sigma) data + sigma noise moves at noise - data: wherever it is looked at, z is the same point of the line."""
    data, end = noise(*shape), noise(*shape, seed=1)
    x, v = (1 - sigma) * data + sigma * end, end - data
    expected = (1 - NOISE_LEVEL) * data + NOISE_LEVEL * end
    torch.testing.assert_close(keep_output(v, x, torch.tensor(sigma), target="noise"), expected, rtol=1e-5, atol=1e-6)


def test_rows_and_pushes_take_histories_of_any_rank():
    history, newest = noise(2, 3, 4, 5, 6), noise(3, 4, 5, 6, seed=1)
    row = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.0, 0.0]])
    expected = row[:, :, None, None, None] * history
    torch.testing.assert_close(apply_row(row, history), expected.sum(0))
    pushed = push(history, newest, torch.tensor([True, False, True]))
    assert torch.equal(pushed[0, 0], newest[0])
    assert torch.equal(pushed[1, 0], history[0, 0])
    assert torch.equal(pushed[:, 1], history[:, 1])


def test_residual_is_the_velocity_where_embedding_and_head_say_nothing():
    """The toy's embedding is zero and its head the identity."""
    of = {target: run(mixture_flow, tolerance=0.02, warmup_steps=2, target=target) for target in ("residual", "velocity")}
    assert of["residual"].pattern() == of["velocity"].pattern()
    torch.testing.assert_close(of["residual"].latents, of["velocity"].latents)


def test_velocities_linear_in_sigma_are_exact():
    field = polynomial_in_sigma(0.5, -2.0)
    settings = {"policy": "planned", "refresh_steps": (9, 17), "warmup_steps": 2, "correction": False}
    result = run(field, target="velocity", **settings)
    assert result.pattern().count("F") == 4
    torch.testing.assert_close(result.latents, euler(field, LATENTS), rtol=1e-5, atol=1e-5)


def test_noise_is_exact_on_a_straight_path_from_the_first_refresh_on():
    result = run(lambda x, sigma: torch.full_like(x, 0.75), target="noise", order=0, policy="planned", warmup_steps=1)
    assert result.pattern() == "F" + "." * 27
    torch.testing.assert_close(result.latents, LATENTS - 0.75, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["velocity", "noise"])
def test_samples_of_a_batch_do_not_know_each_other(target):
    both = run(mixture_flow, tolerance=0.02, warmup_steps=2, target=target)
    for index in range(2):
        config = CacheConfig(tolerance=0.02, warmup_steps=2, target=target)
        alone = sample_toy(mixture_flow, SIGMAS, config, latents=LATENTS[index : index + 1])
        assert alone.pattern() == both.pattern(index)
        torch.testing.assert_close(alone.latents[0], both.latents[index])


def test_a_computed_output_ends_in_the_history_uncorrected():
    """With the correction, what is stepped with is not what the model returned; the history holds the latter."""
    config = CacheConfig(policy="planned", refresh_steps=(5,), warmup_steps=2, target="velocity")
    result = sample_toy(mixture_flow, SIGMAS, config, latents=LATENTS)
    x = result.path[5]
    torch.testing.assert_close(result.states[6].history[0], mixture_flow(x, SIGMAS[5].expand(2)))


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "teacache"},
        {"policy": "dbcache", "first_blocks": 1},
        {"first_blocks": 1},
        {"last_blocks": 1},
        {"layerwise": afcache.Layerwise()},
    ],
    ids=str,
)
def test_what_looks_inside_the_model_needs_residuals(settings: dict):
    with pytest.raises(
        ValueError,
        match=r"target must be 'residual' with .*, which looks inside the model, got 'noise', as presets have\. Start from",
    ):
        CacheConfig(target="noise", **settings)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target must be one of 'residual', 'velocity', 'noise', got 'image'"):
        CacheConfig(target="image")  # pyright: ignore[reportArgumentType]


def test_state_of_an_output_is_as_small_as_latents():
    kept = afcache.init_state(1, 4096, 64, config=dataclasses.replace(tuned(0.016), target="noise"), dtype=torch.bfloat16)
    residuals = afcache.init_state(1, 4096, 3072, config=tuned(0.016, target="residual"), dtype=torch.bfloat16)
    assert kept.history.dtype == torch.float32
    assert residuals.history.dtype == torch.bfloat16
    assert residuals.history.numel() * 2 == 24 * kept.history.numel() * 4


def test_states_of_outputs_take_latents_of_any_rank():
    sizes, config = Sizes(num_blocks=1, dim=8, heads=1, channels=4), tuned(0.016, target="noise")
    for shape in SHAPES:
        state = empty_state(shape_of(sizes, torch.Size(shape), 0, config=config), config=config)
        assert state.history.shape == (2, *shape)
