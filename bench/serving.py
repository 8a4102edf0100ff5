"""Requests at random times on mini-FLUX: what batching with a cache of their own serves, beside batching without one.

    python -m bench.serving                       # 200 requests at saturation, each compared with itself alone; then by load
    python -m bench.serving --requests 40 --loads 1
    python -m bench.serving --simulate            # 2000 requests with the step costs of FLUX.1-dev's shape on an H200

Steps of 20 to 50, guided or not, three tolerances. Some are cancelled on their way, some have arguments that fail. Arrivals are
Poisson's; a load of 1 is what the uncached batcher serves at saturation.
"""

import argparse
import dataclasses
import random
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

import afcache
from afcache.serving.handle import Handle, Served
from bench.load.simulation import BATCHERS, Arrival, Costs
from bench.mini_flux import sampling
from bench.record.naming import RESULTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.record.spread import quantile

_STEPS = (20, 28, 36, 50)
_TOLERANCES = (0.005, 0.01, 0.02)
_PATIENCE = 3600.0
# Of FLUX.1-dev's shape at 1024 x 1024 on one H200 (docs/results.md): a step that computes, and one that does not.
H200 = Costs(computed=0.132, cached=0.00115)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        number: its seed.
        steps, tolerance: its settings.
        is_guided: whether it has a negative prompt.
        fate: "drawn", "cancelled" or "failing".

    """

    number: int
    steps: int
    tolerance: float
    is_guided: bool
    fate: str

    def arguments(self) -> dict[str, Any]:
        """Of the pipeline's call."""
        guided = {"true_cfg_scale": 2.0, "negative_prompt": ""} if self.is_guided else {}
        return {
            # A number is no prompt, which the pipeline refuses.
            "prompt": self.number if self.fate == "failing" else sampling.prompt_of(self.number),
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(self.number),
            "output_type": "latent",
            **sampling.SETTINGS,
            **guided,
        }


class Outcome(NamedTuple):
    """What became of all requests.

    Attributes:
        served: by number.
        seconds: until the last of them.
        metrics: the batcher's.
        failed, cancelled: numbers.
        mib: memory of the process after each twentieth of them.

    """

    served: dict[int, Served]
    seconds: float
    metrics: dict[str, float]
    failed: list[int]
    cancelled: list[int]
    mib: list[float]


def requests(count: int, *, is_troubled: bool) -> list[Asked]:
    """At random, always the same; of troubled ones every tenth is cancelled, and every twentieth fails."""
    chance = random.Random(0)
    fates = {3: "cancelled", 13: "cancelled", 7: "failing"} if is_troubled else {}
    return [
        Asked(number, chance.choice(_STEPS), chance.choice(_TOLERANCES), chance.random() < 0.5, fates.get(number % 20, "drawn"))
        for number in range(count)
    ]


def serve(pipe: Any, asked: Sequence[Asked], *, is_cached: bool, rate: float | None, max_batch: int) -> Outcome:
    """Submit them, at once or at a rate per second, and wait for all."""
    chance, process, mib = random.Random(1), psutil.Process(), []
    with afcache.Batcher(pipe, max_batch=max_batch, max_requests=len(asked)) as batcher:
        started, handles, timers = time.monotonic(), [], []
        for each in asked:
            if rate is not None:
                time.sleep(chance.expovariate(rate))
            handle = batcher.submit(tolerance=each.tolerance if is_cached else 0.0, **each.arguments())
            handles.append(handle)
            if each.fate == "cancelled":
                timers.append(threading.Timer(chance.uniform(0.0, 2.0), handle.cancel))
                timers[-1].start()
        served, failed, cancelled = {}, [], []
        for index, (each, handle) in enumerate(zip(asked, handles, strict=True)):
            _collect(each, handle, served, failed, cancelled)
            if index % max(1, len(asked) // 20) == 0:
                mib.append(process.memory_info().rss / 2**20)
        seconds = time.monotonic() - started
        return Outcome(served, seconds, batcher.metrics(), failed, cancelled, mib)


def _collect(each: Asked, handle: Handle, served: dict[int, Served], failed: list[int], cancelled: list[int]) -> None:
    try:
        served[each.number] = handle.result(_PATIENCE)
    except CancelledError:
        cancelled.append(each.number)
    except ValueError:
        failed.append(each.number)


def alone(pipe: Any, asked: Sequence[Asked]) -> dict[int, tuple[Any, str]]:
    """Each by itself: latents and decisions."""
    found = {}
    for each in asked:
        afcache.compile_pipeline(pipe, tolerance=each.tolerance, compile=False)
        found[each.number] = pipe(**each.arguments()).images[0], afcache.report(pipe).pattern()
        afcache.restore_pipeline(pipe)
    return found


def check(outcome: Outcome, asked: Sequence[Asked], expected: dict[int, tuple[Any, str]]) -> dict[str, Any]:
    """Whether every image is its own, and nobody was lost."""
    pairs = [(outcome.served[number], *own) for number, own in expected.items() if number in outcome.served]
    lost = [each for each in asked if each.fate == "drawn" and each.number not in outcome.served]
    wrong = [each for each in asked if (each.fate == "failing") != (each.number in outcome.failed)]
    early, late = outcome.mib[len(outcome.mib) // 4], outcome.mib[-1]
    return {
        "requests": len(asked),
        "drawn": len(outcome.served),
        "cancelled": len(outcome.cancelled),
        "failed": len(outcome.failed),
        "lost": len(lost),
        "failed wrongly": len(wrong),
        "same decisions as alone": sum(served.pattern == pattern for served, _, pattern in pairs),
        "furthest from alone": max(float((served.image - latents).abs().max()) for served, latents, _ in pairs),
        "MiB, after a quarter": early,
        "MiB, at the end": late,
    }


def row(name: str, load: str, outcome: Outcome) -> dict[str, Any]:
    """Throughput and latency."""
    metrics = outcome.metrics
    return {
        "batcher": name,
        "load": load,
        "requests per second": len(outcome.served) / outcome.seconds,
        "fewer refreshes": metrics["steps"] / metrics["refreshes"],
        "batch fill": metrics["batch_fill"],
        "latency p50 (s)": metrics["latency_p50_seconds"],
        "latency p95 (s)": metrics["latency_p95_seconds"],
    }


def simulate(patterns: Sequence[str], *, count: int, loads: Sequence[float], max_batch: int) -> list[dict[str, Any]]:
    """Rows of throughput and latency by load, of each batcher; a load of 1 is what no cache serves at most."""
    chance = random.Random(0)
    chosen = [chance.choice(patterns) for _ in range(count)]
    full = 1 / (H200.computed * statistics.mean(map(len, chosen)))
    rows = []
    for load in loads:
        now, arrivals = 0.0, []
        for pattern in chosen:
            now += chance.expovariate(load * full)
            arrivals.append(Arrival(now, pattern))
        for name, batch in BATCHERS.items():
            latencies = batch(arrivals, H200, max_batch)
            end = max(each.time + latency for each, latency in zip(arrivals, latencies, strict=True))
            rows.append(
                {
                    "batcher": name,
                    "load": load,
                    "requests per second": count / end,
                    "latency p50 (s)": quantile(latencies, 0.5),
                    "latency p95 (s)": quantile(latencies, 0.95),
                }
            )
    return rows


def write_simulation(pipe: Any, arguments: argparse.Namespace) -> None:
    """The patterns of mini-FLUX's own images at 28 steps, half of them guided, under the default preset."""
    asked = [Asked(seed, 28, afcache.PRESETS["balanced"].tolerance, seed % 2 == 1, "drawn") for seed in range(40)]
    patterns = [pattern for _, pattern in alone(pipe, asked).values()]
    rows = simulate(patterns, count=2000, loads=(0.5, 0.9, 1.5, 2.5, 3.5), max_batch=arguments.max_batch)
    saved = statistics.mean(map(len, patterns)) / statistics.mean(pattern.count("F") for pattern in patterns)
    notes = [
        f"2000 requests of 28 steps, Poisson arrivals, at most {arguments.max_batch} samples a call. A sample's step takes "
        f"{1e3 * H200.computed:g} ms where it is computed, and a call of forecasts {1e3 * H200.cached:g} ms, as FLUX.1-dev's "
        "shape does on one H200. Decisions are those of 40 images of mini-FLUX under the default preset: "
        f"{saved:.2f}x fewer computed steps. A load of 1 is what no cache serves at most. Where a batcher cannot keep up, "
        "latencies grow with the run.",
        "No cache: every step is computed, in batches that change at every step. One state for a batch: a cache that sits in "
        "the model; a batch begins and ends together, and what one of it must compute, all compute.",
    ]
    print(table(rows))
    print(write_result("serving_simulated", "Many requests at once, simulated", rows, notes=notes, folder=arguments.output))


def main() -> None:
    """Serve, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument(
        "--loads", type=float, nargs="*", default=[0.5, 0.8, 1.0, 2.0], help="of what the uncached batcher serves"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of saturation, in turns (default 2)")
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default 2)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--simulate", action="store_true", help="no requests, but the costs of a large model on a GPU")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = sampling.load()
    if arguments.simulate:
        write_simulation(pipe, arguments)
        return
    troubled, sound = (requests(arguments.requests, is_troubled=flag) for flag in (True, False))
    outcome = serve(pipe, troubled, is_cached=True, rate=None, max_batch=arguments.max_batch)
    checked = check(outcome, troubled, alone(pipe, [each for each in troubled if each.fate != "failing"]))
    print(table([checked]))
    rows, speeds = [], {True: [], False: []}
    few = sound[: arguments.requests // 2]
    for _ in range(arguments.rounds):
        for is_cached in (False, True):
            outcome = serve(pipe, few, is_cached=is_cached, rate=None, max_batch=arguments.max_batch)
            rows.append(row("AFCache" if is_cached else "uncached", "saturated", outcome))
            speeds[is_cached].append(rows[-1]["requests per second"])
            print(rows[-1], flush=True)
    gained = statistics.median(ours / theirs for ours, theirs in zip(speeds[True], speeds[False], strict=True))
    promised = rows[1]["fewer refreshes"]
    full = statistics.median(speeds[False])
    for load in arguments.loads:
        for is_cached in (False, True):
            outcome = serve(pipe, few, is_cached=is_cached, rate=load * full, max_batch=arguments.max_batch)
            rows.append(row("AFCache" if is_cached else "uncached", f"{load:g}", outcome))
            print(rows[-1], flush=True)
    summary = {"requests per second, over the uncached batcher's": gained, "promised": promised, "of it": gained / promised}
    notes = [
        f"mini-FLUX, nothing compiled, {arguments.threads} threads, at most {arguments.max_batch} samples a call. Steps of "
        f"{_STEPS}, half of the requests guided, tolerances {_TOLERANCES}. A load is the rate of arrivals over the requests "
        "per second that the uncached batcher serves at saturation, where all arrive at once. Furthest: of latents.",
        "",
        table([checked]),
        "",
        table([summary]),
        "",
    ]
    print(table(rows), table([summary]), sep="\n\n")
    print(
        write_result(
            "serving", "Many requests at once", [*rows, checked, summary], notes=notes, shown=rows, folder=arguments.output
        )
    )


if __name__ == "__main__":
    main()
