"""The cached step of a model without weights as one graph, and what each branch of its decision costs by its shapes."""

import contextlib
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from afcache import CacheConfig
from afcache.functional.initial import empty_state, shape_of, uncoupled
from afcache.functional.model import Architecture, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.models.families import family_of
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from afcache.models.hosted.architecture import HostInputs
from afcache.sampling.primitives import cached_forward, init_state
from bench.models.random_flux import Size, make_flux1
from bench.models.real_sizes import RealSize
from bench.record.clock import seconds_of
from bench.scale.full_size_subject import TEXT_TOKENS
from bench.scale.step_costs import STEPS

COND = torch.ops.higher_order.cond


class Device(NamedTuple):
    """What a device can do at most.

    Attributes:
        name: as tables show it.
        bandwidth: bytes per second.
        compute: bfloat16 FLOP per second.

    """

    name: str
    bandwidth: float
    compute: float


# The H200's were measured, by copies and matrix products; the H100's are its data sheet's (SXM, dense), which no program
# reaches: on the H200 copies reached 90 % of the sheet's 4.8 TB/s, products 79 % of its 989 TFLOP/s.
DEVICES = (Device("H200", 4.3e12, 780e12), Device("H100", 3.35e12, 989e12))


class Captured(NamedTuple):
    """A cached step as one graph.

    Attributes:
        graph: Dynamo's.
        inputs: its fake inputs.
        mode: of the fake tensors.
        seconds: that capturing took.
        transformer, state: what it was captured with.

    """

    graph: torch.fx.GraphModule
    inputs: list[Any]
    mode: FakeTensorMode
    seconds: float
    transformer: Any
    state: Any


def capture(size: Size, config: CacheConfig) -> Captured:
    """Trace the whole cached step of a FLUX.1 without weights, batch 1, bfloat16."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        transformer = make_flux1(size, dtype=torch.bfloat16)
        inputs = make_inputs(size, transformer)
        dim = transformer.config.in_channels if config.forecasts_output else size.dim
        channels = transformer.config.in_channels
        state = init_state(1, size.tokens, dim, config=config, channels=channels, dtype=torch.bfloat16)
        return _trace(transformer, flux1.FLUX, inputs, state, config, mode)


def capture_real(size: RealSize, config: CacheConfig) -> Captured:
    """The same of a family whose model runs its own forward, at its real size."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        transformer = size.make()
        architecture = family_of(transformer).architecture
        inputs = HostInputs(size.arguments())
        shape = shape_of(architecture.sizes(transformer), architecture.latents(inputs).shape, 0, config=config)
        return _trace(transformer, architecture, inputs, empty_state(shape, config=config), config, mode)


def _trace(
    transformer: Any, architecture: Architecture, inputs: Any, state: Any, config: CacheConfig, mode: FakeTensorMode
) -> Captured:
    """Capture a step; within the mode."""
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((graph, inputs))
        return lambda *_: _stop()

    def step(inputs: Any, state: Any, schedule: Any, coupling: Any) -> Any:
        model: dict[str, Any] = {"architecture": architecture, "kernel": scaled_dot_product_attention}
        return cached_forward(transformer, inputs, state, schedule, coupling, config=config, **model)

    schedule = schedule_steps(torch.linspace(1, 0, STEPS + 1), config)[0]
    arguments = (inputs, state, schedule, uncoupled(1))

    def trace() -> None:
        with contextlib.suppress(StoppedError):
            torch.compile(step, fullgraph=True, backend=keep)(*arguments)

    _, seconds = seconds_of(trace)
    (graph, values), *others = found
    assert not others, f"one graph was expected, got {len(found)}"
    return Captured(graph, values, mode, seconds, transformer, state)


class StoppedError(Exception):
    """The graph is known, and fake tensors cannot decide."""


def _stop() -> Any:
    raise StoppedError


def make_inputs(size: Size, transformer: Any) -> flux1_inputs.FluxInputs:
    """One sample at a noise level."""
    config, dtype = transformer.config, torch.bfloat16
    return flux1_inputs.FluxInputs(
        hidden_states=torch.randn(1, size.tokens, config.in_channels, dtype=dtype),
        encoder_hidden_states=torch.randn(1, TEXT_TOKENS, config.joint_attention_dim, dtype=dtype),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, dtype=dtype),
        timestep=torch.ones(1, dtype=dtype),
        img_ids=torch.zeros(size.tokens, 3),
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        guidance=torch.ones(1),
    )


class Walk(torch.fx.Interpreter):
    """Runs a captured step into one branch of its decision, and remembers which inputs it read.

    Args:
        graph: Dynamo's.
        takes_refresh: which branch.

    """

    def __init__(self, graph: torch.fx.GraphModule, *, takes_refresh: bool) -> None:
        super().__init__(graph)
        self._takes_refresh = takes_refresh
        self.used: set[torch.fx.Node] = set()

    def run_node(self, n: torch.fx.Node) -> Any:
        """Follow one branch; everything else as it is."""
        if n.target is not COND:
            self.used |= {node for node in n.all_input_nodes if node.op == "placeholder"}
            return super().run_node(n)
        arguments: Any = n.args
        _, computed, cached, operands = arguments
        branch: Any = getattr(self.module, str((computed if self._takes_refresh else cached).target))
        read = [node for node, inner in zip(operands, _placeholders(branch), strict=True) if inner.users]
        self.used |= {node for node in read if node.op == "placeholder"}
        values: Any = self.fetch_args_kwargs_from_env(n)[0][3]
        return torch.fx.Interpreter(branch).run(*values)


def _placeholders(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


class Cost(NamedTuple):
    """What a step costs.

    Attributes:
        flops: of linear layers and attention.
        read: bytes of all inputs that the branch reads, each once: weights, latents, state.
        written: bytes of what it returns.

    """

    flops: float
    read: int
    written: int

    def seconds(self, device: Device) -> float:
        """What a device cannot beat."""
        return max(self.flops / device.compute, (self.read + self.written) / device.bandwidth)


def attention_of(size: Size) -> float:
    """FLOPs of attention at a refresh: 4 seq^2 dim a block."""
    return 4.0 * (size.tokens + TEXT_TOKENS) ** 2 * size.dim * (size.double + size.single)


def cost_of(step: Captured, attention: float, *, takes_refresh: bool) -> Cost:
    """Walk into a branch and count. torch's counter misses attention, whose FLOPs at a refresh are added."""
    walk = Walk(step.graph, takes_refresh=takes_refresh)
    with step.mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        returned = walk.run(*step.inputs)
    flops = float(counter.get_total_flops() - _counted_attention(counter))
    if takes_refresh:
        flops += attention
    read = sum(bytes_of(value) for node, value in zip(_placeholders(step.graph), step.inputs, strict=True) if node in walk.used)
    return Cost(flops, read, sum(map(bytes_of, pytree.tree_leaves(returned))))


def _counted_attention(counter: FlopCounterMode) -> int:
    """What the counter did see of attention, on releases and devices where it does."""
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op))


def bytes_of(value: Any) -> int:
    """Of a tensor; 0 of anything else."""
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
