"""FLUX.1-dev at its real size: what a step computes, moves and communicates, and what it costs on a GPU.

    python -m bench.full_size --fake                 # no weights: one graph, FLOPs, bytes, messages, and the roofline
    python -m bench.full_size --gpu                  # random weights on a GPU: seconds, waits, memory; under 8 minutes
    python -m bench.full_size --gpu --size tiny --device cpu --backend aot_eager --shapes 96x2

Without weights nothing is computed: with fake tensors the whole cached step of the exact model is captured as one graph, and
the graph is walked twice, once into each branch of its decision.
"""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

# Started as a file, Python looks for modules beside it; bench is found from one folder above.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
# Start-up warnings of other libraries tell a reader of these tables nothing.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from afcache import CacheConfig
from afcache.functional.initial import solo, state_bytes
from afcache.functional.model import Lengths, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.functional.ranks.attention import SequenceRanks
from afcache.functional.ranks.collectives import Ranks
from afcache.functional.ranks.step import Layout
from afcache.functional.ranks.traffic import Call, Traffic, step_traffic
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from afcache.sampling.primitives import cached_forward, init_state
from afcache.settings.presets import resolve_config
from bench.models.random_flux import SIZES, Size, make_flux1
from bench.record.recording import RESULTS, table, write_result
from bench.scale import full_size_gpu
from bench.scale.full_size_subject import TEXT_TOKENS, parse_shape

STEPS = 28
# Beside the model's own, 1024 pixels and one image.
SHAPES = ("512x1", "1024x4", "2048x1")
_COND = torch.ops.higher_order.cond


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
    """Trace the whole cached step of a model without weights, batch 1, bfloat16."""
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.append((graph, inputs))
        return lambda *_: _stop()

    def step(inputs: Any, state: Any, schedule: Any, coupling: Any) -> Any:
        model: dict[str, Any] = {"architecture": flux1.FLUX, "kernel": scaled_dot_product_attention}
        return cached_forward(transformer, inputs, state, schedule, coupling, config=config, **model)

    schedule = schedule_steps(torch.linspace(1, 0, STEPS + 1), config)[0]
    started = time.perf_counter()
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        transformer = make_flux1(size, dtype=torch.bfloat16)
        inputs = make_inputs(size, transformer)
        state = init_state(1, size.tokens, size.dim, config=config, dtype=torch.bfloat16)
        arguments = (inputs, state, type(schedule)(*map(mode.from_tensor, schedule)), solo(1))
        with contextlib.suppress(StoppedError):
            torch.compile(step, fullgraph=True, backend=keep)(*arguments)
    (graph, values), *others = found
    assert not others, f"one graph was expected, got {len(found)}"
    return Captured(graph, values, mode, time.perf_counter() - started, transformer, state)


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
        if n.target is not _COND:
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


def cost_of(step: Captured, size: Size, *, takes_refresh: bool) -> Cost:
    """Walk into a branch and count. torch's counter misses attention, whose 4 seq^2 dim FLOPs a block are added."""
    walk = Walk(step.graph, takes_refresh=takes_refresh)
    with step.mode, torch.no_grad(), FlopCounterMode(display=False) as counter:
        returned = walk.run(*step.inputs)
    flops = float(counter.get_total_flops() - _counted_attention(counter))
    if takes_refresh:
        flops += 4 * (size.tokens + TEXT_TOKENS) ** 2 * size.dim * (size.double + size.single)
    read = sum(_bytes(value) for node, value in zip(_placeholders(step.graph), step.inputs, strict=True) if node in walk.used)
    return Cost(flops, read, sum(map(_bytes, pytree.tree_leaves(returned))))


def _counted_attention(counter: FlopCounterMode) -> int:
    """What the counter did see of attention, on releases and devices where it does."""
    return sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" in str(op))


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def message_rows(size: Size, config: CacheConfig, transformer: Any) -> list[dict[str, Any]]:
    """Collectives and bytes of one rank at 2, 4 and 8 ranks that share the tokens by Ulysses."""
    call = Call(1, Lengths(TEXT_TOKENS, size.tokens), element=2, sizes=flux1.sizes(transformer))
    rows = []
    for count in (2, 4, 8):
        ranks = Ranks("", 0, count)
        layout = Layout(SequenceRanks(ranks, ranks, Ranks()), Ranks(), ranks)
        blocks = size.double + size.single
        kinds: dict[str, Traffic] = {
            "refresh": step_traffic(layout, call, config, is_computed=True, evaluations=blocks),
            "cached step": step_traffic(layout, call, config, is_computed=False, evaluations=0),
        }
        for name, traffic in kinds.items():
            rows.append(
                {
                    "ranks": count,
                    "step": name,
                    "collectives": traffic.collectives,
                    "MiB sent by a rank": traffic.bytes / 2**20,
                }
            )
    return rows


def report(size: Size, name: str, output: Path) -> None:
    """Print and write the tables of `--fake`."""
    config = resolve_config(None)
    step = capture(size, config)
    costs = {kind: cost_of(step, size, takes_refresh=flag) for kind, flag in (("refresh", True), ("cached step", False))}
    rows = [
        {
            "step": kind,
            "TFLOP": cost.flops / 1e12,
            "% of a refresh": 100 * cost.flops / costs["refresh"].flops,
            "MiB read": cost.read / 2**20,
            "MiB written": cost.written / 2**20,
            **{f"{device.name}, at least (ms)": 1e3 * cost.seconds(device) for device in DEVICES},
        }
        for kind, cost in costs.items()
    ]
    messages = message_rows(size, config, step.transformer)
    facts = facts_of(step, size)
    devices = [{"device": d.name, "TB/s": d.bandwidth / 1e12, "TFLOP/s": d.compute / 1e12} for d in DEVICES]
    limits = ", ".join(f"{d['device']} {d['TB/s']:.2f} TB/s, {d['TFLOP/s']:.0f} TFLOP/s" for d in devices)
    notes = [
        f"{size.double} + {size.single} blocks, hidden {size.dim}, {size.tokens} image and {TEXT_TOKENS} text tokens, "
        "bfloat16, batch 1. Nothing was computed: shapes alone.",
        "FLOPs: linear layers by torch.utils.flop_counter, attention 4 seq^2 dim a block. Bytes: every input that the branch "
        "reads, once, and what it returns; the history is returned as a copy. At least: the larger of FLOPs / peak and "
        f"bytes / bandwidth, with {limits}. The H200's were measured, the H100's are its data sheet's, which no program "
        "reaches: compare steps of one device, not the devices.",
        "",
        table([facts]),
        "",
        table(messages),
    ]
    print(table(rows), *notes, sep="\n")
    title = f"FLUX.1-dev, a step by its shapes{'' if name == 'flux1' else f' (size {name})'}"
    write_result(f"full_size_fake_{name}", title, [*rows, facts, *messages, *devices], notes=notes, folder=output, shown=rows)


def facts_of(step: Captured, size: Size) -> dict[str, Any]:
    """What is said of the step as a whole."""
    state = state_bytes(step.state)
    return {
        "graphs": 1,
        "graph breaks": sum(counters["graph_break"].values()),
        "decisions": sum(node.target is _COND for node in step.graph.graph.nodes),
        "captured in (s)": step.seconds,
        "weights (GiB)": sum(_bytes(parameter) for parameter in step.transformer.parameters()) / 2**30,
        "state (MiB)": state / 2**20,
        "state (image tokens)": state / (size.tokens * size.dim * 2),
    }


def main() -> None:
    """Count, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fake", action="store_true", help="count by shapes, without weights")
    what.add_argument("--gpu", action="store_true", help="measure, with random weights")
    add("--size", choices=SIZES, default="flux1", help="default: flux1, FLUX.1-dev's own")
    add("--output", type=Path, default=RESULTS, help="folder of the tables")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="to measure on (default cuda)")
    add("--backend", default="inductor", help="of torch.compile")
    add("--minutes", type=float, default=7.5, help="what no longer fits is left out (default 7.5)")
    add("--steps", type=int, default=28, help="of an image (default 28)")
    add("--rounds", type=int, default=3, help="images of each contender, after one that warms up (default 3)")
    add("--profiled", type=int, default=8, help="steps of the image in which waits are counted (default 8)")
    add("--shapes", nargs="*", type=parse_shape, default=[parse_shape(text) for text in SHAPES], metavar="PIXELSxBATCH")
    add("--modes", nargs="*", default=["reduce-overhead", "max-autotune-no-cudagraphs"], help="of torch.compile")
    arguments = parser.parse_args()
    if arguments.fake:
        report(SIZES[arguments.size], arguments.size, arguments.output)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. Use --device cpu --size tiny to see that it runs, or --fake.")
    full_size_gpu.measure(arguments)


if __name__ == "__main__":
    main()
