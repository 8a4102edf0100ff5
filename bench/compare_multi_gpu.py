"""One process against several: seconds and messages of every kind of step, and what caching gains at each size.

    python bench/compare_multi_gpu.py                                   # CPU: random weights, gloo, 1, 2 and 4 processes
    python bench/compare_multi_gpu.py --size flux1 --dtype bfloat16 --device cuda \\
        --divisions alone ulysses2 ulysses4 ulysses8 guided guided-cfg2 guided-cfg2-ulysses4

A division is the degrees that share the work: ulysses, ring and cfg with a number, joined by "-"; "guided" adds a second
guidance branch. Every division is started by torchrun, draws with the shared but uncached model and with refreshes forced at
the same steps, in turns, and its latents are compared with those of one process. Random weights: costs and agreement, never
quality.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

# Started as a file, Python looks for modules beside it; bench is found from one folder above.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
# Start-up warnings of other libraries tell a reader of this table nothing.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import numpy as np
import torch
from diffusers import FluxTransformer2DModel

import afcache
from afcache import CacheConfig, ParallelConfig
from bench.models.random_flux import SIZES, draw_random, make_pipeline
from bench.race.subjects import DTYPES, Task, load
from bench.record.naming import RESULTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.record.spread import shown_spread
from bench.scale.step_costs import STEPS, forced

DIVISIONS = ["alone", "ulysses2", "ring2", "ulysses4", "ulysses2-ring2", "guided", "guided-cfg2", "guided-cfg2-ulysses2"]
_WORD = re.compile(r"(ulysses|ring|cfg)([1-9]\d*)")


class Division(NamedTuple):
    """How a run is shared out.

    Attributes:
        name: as given.
        degrees: by the names of `ParallelConfig`.
        is_guided: whether there are two guidance branches.

    """

    name: str
    degrees: dict[str, int]
    is_guided: bool

    @property
    def processes(self) -> int:
        """How many share the work."""
        return math.prod(self.degrees.values())


def parse_division(text: str) -> Division:
    """Read "alone" or, e.g., "guided-cfg2-ulysses4".

    Raises:
        ArgumentTypeError: a word is none of those.

    """
    degrees: dict[str, int] = {}
    for word in text.split("-"):
        found = _WORD.fullmatch(word)
        if found is not None:
            degrees[f"{found[1]}_degree"] = int(found[2])
        elif word not in ("alone", "guided"):
            raise argparse.ArgumentTypeError(f"{word!r} in {text!r} is none of alone, guided, ulyssesN, ringN, cfgN")
    is_guided = "guided" in text.split("-")
    if degrees.get("cfg_degree", 1) > 1 and not is_guided:
        raise argparse.ArgumentTypeError(f"{text!r} shares guidance branches, but has none; write guided-{text}")
    return Division(text, degrees, is_guided)


def measure(division: Division, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one rank of a division sees: seconds of every step by policy and kind, messages, and the last latents."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if arguments.device == "cuda" else "cpu"
    size = SIZES[arguments.size]
    transformer = load(Task(f"random:{arguments.size}", STEPS, device=device, dtype=arguments.dtype)).transformer
    parallel = None
    if division.processes > 1:
        degrees: dict[str, Any] = division.degrees
        parallel = ParallelConfig(**degrees, backend="gloo" if device == "cpu" else None)
    settings = {"uncached": afcache.policy("none"), "cached": forced(arguments.interval)}
    pipes = {name: _pipeline(twin_of(transformer), config, parallel, arguments) for name, config in settings.items()}
    scale = 2.0 if division.is_guided else 1.0
    seconds: dict[str, list[list[float]]] = {name: [] for name in pipes}
    latents: dict[str, np.ndarray] = {}
    for _ in range(arguments.rounds + 1):
        for name, pipe in pipes.items():
            latents[name] = draw_random(pipe, size.tokens, steps=STEPS, true_cfg_scale=scale)
            seconds[name].append(_step_seconds(afcache.report(pipe)))
    report = afcache.report(pipes["cached"])
    # The first step computes all guidance branches on every rank; the last one of each kind is the rule.
    kinds = {kind: [s for s in report.steps if s.branch == 0 and s.is_computed == flag][-1] for kind, flag in _KINDS.items()}
    return {
        "seconds": {name: rounds[1:] for name, rounds in seconds.items()},
        "pattern": report.pattern(),
        "collectives": {kind: step.collectives for kind, step in kinds.items()},
        "bytes": {kind: step.bytes_sent for kind, step in kinds.items()},
        "latents": {name: value.tolist() for name, value in latents.items()},
    }


_KINDS = {"refresh": True, "cached": False}


def twin_of(transformer: Any) -> Any:
    """Another module with the same weights in the same memory."""
    with torch.device("meta"):
        twin: Any = FluxTransformer2DModel.from_config(transformer.config)
    twin.load_state_dict(transformer.state_dict(), assign=True)
    return twin.eval()


def _pipeline(transformer: Any, config: CacheConfig, parallel: ParallelConfig | None, arguments: argparse.Namespace) -> Any:
    pipe = make_pipeline(transformer)
    compiled: dict[str, Any] = {"compile": False} if arguments.backend == "none" else {"backend": arguments.backend}
    return afcache.compile_pipeline(pipe, config, parallel=parallel, **compiled)


def _step_seconds(report: afcache.Report) -> list[float]:
    """Seconds of each denoising step, all its calls together."""
    totals = [0.0] * report.num_steps
    for call in report.steps:
        totals[call.step] += call.seconds
    return totals


def run_division(division: Division, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start a division and read what its ranks saw.

    Raises:
        RuntimeError: with the last lines of what it said.

    """
    with tempfile.TemporaryDirectory() as folder:
        passed = [
            f"--{name}={getattr(arguments, name)}" for name in ("size", "interval", "rounds", "device", "dtype", "backend")
        ]
        command = [sys.executable, "-W", "ignore", "-m"]
        if division.processes > 1:
            command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(division.processes), "-m"]
        command += ["bench.compare_multi_gpu", "--worker", folder, "--divisions", division.name, *passed]
        threads = {"OMP_NUM_THREADS": str(arguments.threads)} if arguments.device == "cpu" else {}
        root = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, **threads, "PYTHONPATH": root}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(f"{division.name} failed:\n" + "\n".join(result.stderr.strip().splitlines()[-30:]))
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("rank*.json"))]


def row_of(division: Division, ranks: list[dict[str, Any]], alone: list[dict[str, Any]], is_timed: bool) -> dict[str, Any]:
    """A line of the table.

    Args:
        division: which.
        ranks: what its ranks saw.
        alone: the same of one process.
        is_timed: False where processes had to share cores: their seconds mean nothing.

    """
    first, one = ranks[0], alone[0]
    refreshed = [kind == "F" for kind in first["pattern"]]
    images = first["seconds"]["cached"]
    # Step 0 computes both guidance branches everywhere, and belongs to no kind.
    by_kind = {
        "refresh": [1e3 * s for image in images for s, full in list(zip(image, refreshed, strict=True))[1:] if full],
        "cached step": [1e3 * s for image in images for s, full in zip(image, refreshed, strict=True) if not full],
    }
    uncached = [1e3 * s for image in first["seconds"]["uncached"] for s in image[1:]]
    gains = [sum(a) / sum(b) for a, b in zip(first["seconds"]["uncached"], images, strict=True)]
    scaling = statistics.median(s for image in one["seconds"]["uncached"] for s in image[1:]) * 1e3
    promised = len(refreshed) / sum(refreshed)
    unknown = "not measured"
    return {
        "division": division.name,
        "processes": division.processes,
        "uncached step (ms)": shown_spread(uncached) if is_timed else unknown,
        "refresh (ms)": shown_spread(by_kind["refresh"]) if is_timed else unknown,
        "cached step (ms)": shown_spread(by_kind["cached step"]) if is_timed else unknown,
        "gain of caching": shown_spread(gains) if is_timed else unknown,
        "promised": promised,
        "gain of processes, uncached": scaling / statistics.median(uncached) if is_timed else unknown,
        "collectives, refresh": first["collectives"]["refresh"],
        "collectives, cached": first["collectives"]["cached"],
        "KiB sent, refresh": first["bytes"]["refresh"] / 1024,
        "KiB sent, cached": first["bytes"]["cached"] / 1024,
        "largest difference": max(_difference(rank, one) for rank in ranks),
        "same decisions": "yes" if all(rank["pattern"] == one["pattern"] for rank in ranks) else "no",
    }


def _difference(rank: dict[str, Any], one: dict[str, Any]) -> float:
    """Between final latents, of both policies, relative to the largest of one process's."""
    pairs = [(np.asarray(rank["latents"][name]), np.asarray(one["latents"][name])) for name in one["latents"]]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def main() -> None:
    """Run every division, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--divisions", nargs="+", type=parse_division, default=[parse_division(text) for text in DIVISIONS], metavar="NAME")
    add("--size", choices=SIZES, default="small", help="of the random weights (default small)")
    add("--interval", type=int, default=4, help="steps between refreshes (default 4)")
    add("--rounds", type=int, default=3, help="images of each policy, after one that compiles (default 3)")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="float32")
    add("--backend", default="inductor", help='of torch.compile; "none" compiles nothing')
    add("--threads", type=int, default=1, help="of each CPU process, alone too (default 1)")
    add("--output", type=Path, default=RESULTS, help="folder (default bench/results)")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        saw = measure(arguments.divisions[0], arguments)
        (arguments.worker / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(saw))
        return
    found: dict[bool, list[dict[str, Any]]] = {}
    rows = []
    for division in arguments.divisions:
        if division.is_guided not in found:
            found[division.is_guided] = run_division(parse_division("guided" if division.is_guided else "alone"), arguments)
        alone = found[division.is_guided]
        ranks = alone if division.processes == 1 else run_division(division, arguments)
        is_timed = arguments.device == "cuda" or division.processes * arguments.threads <= (os.cpu_count() or 1)
        rows.append(row_of(division, ranks, alone, is_timed))
        print(f"{division.name}: largest difference {rows[-1]['largest difference']:.1e}", flush=True)
    threads = f", {arguments.threads} thread(s) a process, gloo" if arguments.device == "cpu" else ""
    size = SIZES[arguments.size]
    notes = [
        f"Random weights, hidden {size.dim}, {size.double} + {size.single} blocks, {size.tokens} image tokens, {STEPS} steps, "
        f"{arguments.dtype}{threads}, {arguments.rounds} images of each policy in turns after one that compiles.",
        "Median (quartiles; extremes of gains). The gain of caching compares the transformer's seconds of cached and uncached "
        "images of the same division; messages are those of one rank at one step, by the report, which tests count.",
        "Seconds of divisions with more processes than cores are not measured.",
    ]
    write_result("multi_gpu", "Several processes", rows, notes=notes, device=arguments.device, folder=arguments.output)
    print(table(rows))


if __name__ == "__main__":
    main()
