"""FLUX.1-dev at its real size: what a step computes, moves and communicates, and what it costs on a GPU.

    python -m bench.full_size --fake                 # no weights: one graph, FLOPs, bytes, messages, and the roofline
    python -m bench.full_size --fake --size wan22_a14b   # another family at its real size
    python -m bench.full_size --gpu                  # random weights on a GPU: seconds, waits, memory; under 8 minutes
    python -m bench.full_size --gpu --minutes 15     # with time for modes that autotune
    python -m bench.full_size --gpu --size tiny --device cpu --backend aot_eager --shapes 96x2

Without weights nothing is computed: with fake tensors the whole cached step of the exact model is captured as one graph, and
the graph is walked twice, once into each branch of its decision.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

# Started as a file, Python looks for modules beside it; bench is found from one folder above.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
# Start-up warnings of other libraries tell a reader of these tables nothing.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from torch._dynamo.utils import counters

from afcache import CacheConfig
from afcache.functional.initial import state_bytes
from afcache.functional.model import Lengths
from afcache.functional.ranks.attention import SequenceRanks
from afcache.functional.ranks.collectives import Ranks
from afcache.functional.ranks.step import Layout
from afcache.functional.ranks.traffic import Call, Traffic, step_traffic
from afcache.models.flux1.architecture import sizes
from afcache.settings.config import Target
from afcache.settings.presets import DEFAULT_TARGET, preset_config
from bench.models.random_flux import SIZES, Size
from bench.models.real_sizes import REAL_SIZES, RealSize
from bench.record.naming import RESULTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.scale import full_size_gpu
from bench.scale.captured_step import COND, DEVICES, Captured, attention_of, bytes_of, capture, capture_real, cost_of
from bench.scale.full_size_subject import TEXT_TOKENS, parse_shape

# Beside the model's own, 1024 pixels and one image.
SHAPES = ("512x1", "1024x4", "2048x1")
# Those that are compared with all blocks; AFCache on few blocks, at all shapes and in all modes; decisions made ahead.
CONTENDERS = ("plain", "regional", "blocks", "step", "variants", "ahead")


def message_rows(size: Size, config: CacheConfig, transformer: Any) -> list[dict[str, Any]]:
    """Collectives and bytes of one rank at 2, 4 and 8 ranks that share the tokens by Ulysses."""
    call = Call(1, Lengths(TEXT_TOKENS, size.tokens), element=2, sizes=sizes(transformer))
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


def count(size: Size, name: str, target: Target, output: Path) -> None:
    """Print and write the tables of `--fake`."""
    config = preset_config("balanced", target=target)
    step = capture(size, config)
    rows = cost_rows(step, attention_of(size))
    messages = message_rows(size, config, step.transformer)
    facts = facts_of(step)
    facts["state (image tokens)"] = state_bytes(step.state) / (size.tokens * size.dim * 2)
    devices = [{"device": d.name, "TB/s": d.bandwidth / 1e12, "TFLOP/s": d.compute / 1e12} for d in DEVICES]
    limits = ", ".join(f"{d['device']} {d['TB/s']:.2f} TB/s, {d['TFLOP/s']:.0f} TFLOP/s" for d in devices)
    notes = [
        f"{size.double} + {size.single} blocks, hidden {size.dim}, {size.tokens} image and {TEXT_TOKENS} text tokens, "
        f"bfloat16, batch 1. A cached step forecasts the {target}. Nothing was computed: shapes alone.",
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
    everything = [*rows, facts, *messages, *devices]
    kind = "" if target == DEFAULT_TARGET else f"{target}_"
    write_result(f"full_size_fake_{kind}{name}", title, everything, notes=notes, shown=rows, device=None, folder=output)


def count_real(size: RealSize, name: str, output: Path) -> None:
    """The same of a family at its real size, whose cached step sends nothing."""
    step = capture_real(size, preset_config("balanced", target="noise"))
    rows, facts = cost_rows(step, size.attention_flops), facts_of(step)
    notes = [
        f"{size.blocks} blocks, hidden {size.dim}, {size.tokens} tokens of the sample and {size.text} of text, bfloat16, batch "
        "1, one guidance branch. A cached step forecasts the noise. Nothing was computed: shapes alone.",
        "FLOPs: linear layers by torch.utils.flop_counter, and 4 FLOPs for each query, key and channel of attention. Bytes and "
        "times as in full_size_fake_flux1.",
        "",
        table([facts]),
    ]
    print(table(rows), *notes, sep="\n")
    title = f"{size.title}: a step by its shapes"
    write_result(f"full_size_fake_{name}", title, [*rows, facts], notes=notes, shown=rows, device=None, folder=output)


def cost_rows(step: Captured, attention: float) -> list[dict[str, Any]]:
    """What a refresh and a cached step compute, move, and take at least."""
    kinds = (("refresh", True), ("cached step", False))
    costs = {kind: cost_of(step, attention, takes_refresh=flag) for kind, flag in kinds}
    return [
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


def facts_of(step: Captured) -> dict[str, Any]:
    """What is said of the step as a whole."""
    return {
        "graphs": 1,
        "graph breaks": sum(counters["graph_break"].values()),
        "decisions": sum(node.target is COND for node in step.graph.graph.nodes),
        "captured in (s)": step.seconds,
        "weights (GiB)": sum(bytes_of(parameter) for parameter in step.transformer.parameters()) / 2**30,
        "state (MiB)": state_bytes(step.state) / 2**20,
    }


def main() -> None:
    """Count, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--fake", action="store_true", help="count by shapes, without weights")
    what.add_argument("--gpu", action="store_true", help="measure, with random weights")
    add(
        "--size",
        choices=(*SIZES, *REAL_SIZES),
        default="flux1",
        help="default: flux1, FLUX.1-dev's own; other families with --fake",
    )
    add("--output", type=Path, default=RESULTS, help="folder of the tables")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="to measure on (default cuda)")
    add("--backend", default="inductor", help="of torch.compile")
    add("--minutes", type=float, default=7.5, help="what no longer fits is left out (default 7.5)")
    add("--steps", type=int, default=28, help="of an image (default 28)")
    add("--rounds", type=int, default=3, help="images of each contender, after one that warms up (default 3)")
    add("--profiled", type=int, default=8, help="steps of the image in which waits are counted (default 8)")
    add("--shapes", nargs="*", type=parse_shape, default=[parse_shape(text) for text in SHAPES], metavar="PIXELSxBATCH")
    add(
        "--target",
        choices=get_args(Target),
        default=DEFAULT_TARGET,
        help=f"what a cached step forecasts (default {DEFAULT_TARGET})",
    )
    add("--contenders", nargs="*", choices=CONTENDERS, default=CONTENDERS, help="leave some out to save time")
    add("--modes", nargs="*", default=["reduce-overhead", "max-autotune-no-cudagraphs"], help="of torch.compile")
    arguments = parser.parse_args()
    if arguments.size in REAL_SIZES:
        if not arguments.fake:
            parser.error(f"--size {arguments.size} goes with --fake alone: other families' costs are counted, not measured.")
        count_real(REAL_SIZES[arguments.size], arguments.size, arguments.output)
        return
    if arguments.fake:
        count(SIZES[arguments.size], arguments.size, arguments.target, arguments.output)
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. Use --device cpu --size tiny to see that it runs, or --fake.")
    full_size_gpu.measure(arguments)


if __name__ == "__main__":
    main()
