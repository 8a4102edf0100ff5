"""Guards: all of them at an image's first calls, none afterwards, and nothing stale."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list

import afcache
from afcache._typing import PerSample, typed
from afcache.functional.branch import branch
from afcache.runtime.compiled import CompiledStep, CompileOptions
from tests.support.sampling import ADAPTIVE, largest_difference, make_lora, sample

pytestmark = pytest.mark.host
OPTIONS = CompileOptions(backend="aot_eager")


class Scaled(nn.Module):
    """Reads a weight and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)
        self.factor = 2.0


def make_step(module: Scaled, options: CompileOptions = OPTIONS) -> CompiledStep:
    def step(x: Tensor, is_scaled: Tensor) -> Tensor:
        return branch(is_scaled, lambda: x * module.weight * module.factor, lambda: x.clone())

    return CompiledStep(step, torch.compile, options)  # pyright: ignore[reportArgumentType]


def test_without_guards_the_same_code_runs():
    module, x, yes = Scaled(), torch.arange(3.0), torch.tensor(True)
    step = make_step(module)
    assert torch.equal(step(x, yes), 2 * x)
    settled = step.without_guards(x, yes)
    assert settled is not step
    assert torch.equal(settled(x, yes), 2 * x)
    assert torch.equal(settled(x + 1, ~yes), x + 1)
    # Weights are read anew; a number of the module was a constant of the trace, and its guard is not asked.
    module.weight.data = torch.full((3,), 3.0)
    module.weight = nn.Parameter(torch.full((3,), 5.0), requires_grad=False)
    module.factor = 100.0
    assert torch.equal(settled(x, yes), 10 * x)
    assert torch.equal(step(x, yes), 500 * x)
    assert torch.equal(step.without_guards(x, yes)(x, yes), 500 * x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_more_graphs_than_dynamo_keeps_forget_the_old_ones():
    """Dynamo's limit is 8, and under fullgraph an error; here the ninth starts afresh."""
    module, x, yes = Scaled(), torch.arange(3.0), torch.tensor(True)
    step = make_step(module)
    limit = torch._dynamo.config.recompile_limit
    for factor in range(2 * limit):
        module.factor = float(factor)
        assert torch.equal(step(x, yes), factor * x)
        assert torch.equal(step.without_guards(x, yes)(x, yes), factor * x)
        assert len(_debug_get_cache_entry_list(step._function.__code__)) <= limit
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * limit


def test_without_guards_finds_the_code_that_fits():
    module, yes = Scaled(), torch.tensor(True)
    step = make_step(module)
    one, two = torch.arange(3.0), torch.arange(6.0).reshape(2, 3)
    expected = [step(x, yes) for x in (one, two)]
    for x, result in zip((one, two), expected, strict=True):
        assert torch.equal(step.without_guards(x, yes)(x, yes), result)
    # Nothing was compiled for this one.
    assert step.without_guards(two.double(), yes) is step


def test_what_is_not_compiled_checks_no_shapes_without_guards():
    @typed
    def total(x: PerSample) -> Tensor:
        return x.sum()

    step = CompiledStep(lambda x: total(x), torch.compile, CompileOptions(enabled=False))  # pyright: ignore[reportArgumentType]
    square = torch.ones(2, 2)
    assert step.without_guards(square)(square) == 4
    with pytest.raises(TypeCheckError):
        step(square)


def test_results_do_not_lie_in_memory_that_the_next_call_overwrites():
    options = CompileOptions(mode="reduce-overhead")
    assert options.uses_cuda_graphs
    result, buffer = torch.zeros(2), torch.zeros(2)

    def compiler(function: Any, **_: Any) -> Any:
        del function
        return lambda: buffer

    step = CompiledStep(make_step(Scaled())._function, compiler, options)
    result = step()
    buffer.fill_(1.0)
    assert torch.equal(result, torch.zeros(2))


def unguarded_calls(pipe) -> list[bool]:
    """For each branch of the last image, whether it ended without guards."""
    runtime = pipe.transformer._afcache
    branches = runtime.last_trajectory(pipe).present
    return [isinstance(branch.unguarded.get(None), type(lambda: 0)) for branch in branches]


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_pipeline_checks_guards_at_the_start_of_every_image(short, cfg: float):
    """A block's number that changes between steps is seen by the next image, and by no recompilation before."""
    afcache.compile_pipeline(short, ADAPTIVE, backend="aot_eager")
    first = sample(short, cfg=cfg, output_type="latent")
    assert unguarded_calls(short) == [True] * (1 if cfg == 1 else 2)
    norm = short.transformer.norm_out.norm
    graphs = []

    def disturb(_pipe, step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        norm.eps = 1e-6 if step < 5 else 0.5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return arguments

    try:
        second = sample(short, cfg=cfg, output_type="latent", callback_on_step_end=disturb)
        assert set(graphs) == {1}
        assert largest_difference(second, first) == 0
        third = sample(short, cfg=cfg, output_type="latent")
    finally:
        norm.eps = 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert largest_difference(third, first) > 1e-3


def test_adapters_switched_within_an_image_are_not_stale(short, tmp_path):
    """A transformer with adapters keeps its guards, and one that gets some in the middle of an image gets them back."""
    make_lora(tmp_path)

    def switch(pipe, step: int, _timestep, arguments: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            pipe.load_lora_weights(tmp_path)
        if step == 8:
            pipe.unload_lora_weights()
        return arguments

    config = afcache.CacheConfig(tolerance=0.0)
    afcache.compile_pipeline(short, config, compile=False)
    eager = sample(short, steps=12, output_type="latent", callback_on_step_end=switch)
    plain = sample(short, steps=12, output_type="latent")
    assert largest_difference(eager, plain) > 0.01
    afcache.compile_pipeline(short, config, backend="aot_eager")
    assert largest_difference(sample(short, steps=12, output_type="latent"), plain) < 1e-4
    switched = sample(short, steps=12, output_type="latent", callback_on_step_end=switch)
    assert largest_difference(switched, eager) < 1e-4
