"""What a cached step costs: random weights, forced refreshes, never a word about quality.

    python -m bench.overhead steps                   # refresh and cached step against the compiled, uncached model
    python -m bench.overhead parts                   # where a cached step spends its time
    python -m bench.overhead continuity              # what it costs to see that a step begins where the last one led
    python -m bench.overhead compile                 # cold compile seconds at 12, 24 and 57 blocks

Everything is measured in one process, in alternation; medians, and the spread between quartiles. Leave the machine alone.
"""

import argparse

import torch

from bench.record.recording import write_result
from bench.record.render import table
from bench.scale.compile_costs import CONTENDERS, first_call, measure_compilation
from bench.scale.continuity_costs import measure_continuity
from bench.scale.part_costs import measure_parts
from bench.scale.step_costs import measure_steps

_NOTES = {
    "steps": "Median (quartiles). float32, batch 1, 64 text tokens, 28 steps, 2 warmup steps. Compiled: one graph of the whole "
    "step, or the model's own blocks, one by one, and a cached step apart. Efficiency: speed-up of the transformer's time over "
    "the compiled, uncached model, divided by what the skipped blocks promise; both are compiled with the same settings. "
    "Speed-up and efficiency are made of the medians of steps.",
    "parts": "Median (quartiles). float32, batch 1, 64 text tokens. Parts are compiled and timed alone, ours as the "
    "runtime calls them from an image's third step on: without guards. The last three rows are differences of medians.",
    "continuity": "Median (quartiles). float32, batch 1, 64 text tokens, 64 channels, compiled, without guards, as the runtime "
    "calls a step from an image's third on. The difference is one of medians.",
    "compile": "Each first call in a process of its own, caches off. Blocks are regions too, but outside of a graph: a region "
    "inside a branch of torch.cond fails in inductor (tests/contract/test_compile_contract_regions.py); a branch inside every "
    "region would compile, and wait for the device at every block instead of once a step.",
}


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["steps", "parts", "continuity", "compile", "first-call"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024], help="image tokens; squares")
    parser.add_argument("--intervals", type=int, nargs="+", default=[2, 4, 8], help="steps between refreshes")
    parser.add_argument("--rounds", type=int, default=5, help="images per contender")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 8, 16, 19, 38], help="pairs: double, single")
    parser.add_argument("--contender", choices=CONTENDERS, default="plain")
    parser.add_argument("--backend", default="inductor")
    arguments = parser.parse_args()
    if arguments.task == "first-call":
        double, single = arguments.blocks[:2]
        print(first_call(arguments.contender, double, single, arguments.backend))
        return
    if arguments.task == "steps":
        title = "What a cached step costs, hidden 512, 4 + 8 blocks, random weights"
        rows = [row for tokens in arguments.tokens for row in measure_steps(tokens, arguments.intervals, arguments.rounds)]
    elif arguments.task == "parts":
        title = "Where the time goes, hidden 512, 4 + 8 blocks, random weights"
        with torch.no_grad():
            rows = [row for tokens in arguments.tokens for row in measure_parts(tokens, 20 * arguments.rounds)]
    elif arguments.task == "continuity":
        title = "What it costs a cached step to look where it begins, hidden 512, 4 + 8 blocks, random weights"
        with torch.no_grad():
            rows = [row for tokens in arguments.tokens for row in measure_continuity(tokens, 100 * arguments.rounds)]
    else:
        title = "Cold compile: seconds of the first call, hidden 128, 64 image tokens"
        pairs = list(zip(arguments.blocks[::2], arguments.blocks[1::2], strict=True))
        rows = list(measure_compilation(pairs, list(CONTENDERS), arguments.backend))
    print(table(rows))
    write_result(f"overhead_{arguments.task}", title, rows, notes=[_NOTES[arguments.task]])


if __name__ == "__main__":
    main()
