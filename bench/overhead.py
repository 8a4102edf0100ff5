"""What a cached step costs: random weights, forced refreshes, never a word about quality.

    python -m bench.overhead steps                   # refresh and cached step against the compiled, uncached model
    python -m bench.overhead parts                   # where a cached step spends its time
    python -m bench.overhead compile                 # cold compile seconds at 12, 24 and 57 blocks

Everything is measured in one process, in alternation; medians, and the spread between quartiles. Leave the machine alone.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import afcache
from afcache import CacheConfig
from afcache.functional import forecast
from afcache.functional.decision import forecast_row
from afcache.functional.initial import solo
from afcache.functional.model import Architecture, Embedded, scaled_dot_product_attention
from afcache.functional.plans import schedule_steps
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from afcache.runtime.compiled import CompiledStep, CompileOptions
from afcache.runtime.steps import write_newest
from afcache.sampling.primitives import cached_forward, init_state
from bench.models.random_flux import TEXT_TOKENS, draw_random, make_pipeline, make_transformer
from bench.record.recording import table, write_result

STEPS = 28
WARMUP = 2
_FORECAST = "forecast (one row over the history)"
_MACHINERY = "machinery with an empty model"


class Stopwatch:
    """Seconds of every transformer call of an image, taken outside of whatever forward is bound."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.seconds: list[float] = []
        self._started = 0.0
        transformer.register_forward_pre_hook(self._start)
        transformer.register_forward_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def time_image(pipe: Any, tokens: int) -> float:
    """Seconds of the whole pipeline for one image, always the same."""
    started = time.perf_counter()
    draw_random(pipe, tokens, steps=STEPS)
    return time.perf_counter() - started


def forced(interval: int) -> CacheConfig:
    """A refresh every `interval` steps after the warmup, with every computation that the default policy makes."""
    return CacheConfig(policy="fixed", interval=interval, warmup_steps=WARMUP, damping=0.2, error_exponent=1.0)


def measure_steps(tokens: int, intervals: list[int], rounds: int) -> list[dict[str, Any]]:
    """Rows of the main table for one number of tokens."""
    torch._dynamo.reset()
    transformers = [make_transformer(dim=512, double=4, single=8) for _ in range(1 + len(intervals))]
    pipes = [make_pipeline(transformer) for transformer in transformers]
    watches = [Stopwatch(transformer) for transformer in transformers]
    # Not Module.compile, which would trace the stopwatch, too.
    # The same settings as ours.
    tuning = CompileOptions().tuning()
    transformers[0].forward = torch.compile(transformers[0].forward, fullgraph=True, **tuning)
    for pipe, interval in zip(pipes[1:], intervals, strict=True):
        afcache.compile_pipeline(pipe, forced(interval))
    for pipe in pipes:
        time_image(pipe, tokens)
    totals: list[list[float]] = [[] for _ in pipes]
    for watch in watches:
        watch.seconds.clear()
    for r in range(rounds):
        # Whoever comes first in one round comes later in the next.
        for i in range(len(pipes)):
            index = (i + r) % len(pipes)
            totals[index].append(time_image(pipes[index], tokens))
    plain = watches[0].seconds
    rows = []
    for i, interval in enumerate(intervals, start=1):
        pattern = afcache.report(pipes[i]).pattern() * rounds
        refreshes = [s for s, kind in zip(watches[i].seconds, pattern, strict=True) if kind == "F"]
        cached = [s for s, kind in zip(watches[i].seconds, pattern, strict=True) if kind == "."]
        promised = len(pattern) / pattern.count("F")
        # Single images differ by the machine's mood; medians of steps do not, so the speed-up is made of them.
        share = pattern.count("F") / len(pattern)
        step = share * statistics.median(refreshes) + (1 - share) * statistics.median(cached)
        gain = statistics.median(plain) / step
        gains = [_sum(plain, r) / _sum(watches[i].seconds, r) for r in range(rounds)]
        pipeline_gains = [a / b for a, b in zip(totals[0], totals[i], strict=True)]
        rows.append(
            {
                "image tokens": tokens,
                "refresh every": interval,
                "uncached step (ms)": _spread([1e3 * s for s in plain]),
                "refresh (ms)": _spread([1e3 * s for s in refreshes]),
                "cached step (ms)": _spread([1e3 * s for s in cached]),
                "cached / refresh (%)": 100 * statistics.median(cached) / statistics.median(refreshes),
                "promised": promised,
                "speed-up": gain,
                "efficiency": gain / promised,
                "speed-up, image by image": _spread(gains),
                "speed-up, whole pipeline": _spread(pipeline_gains),
            }
        )
    return rows


def _sum(seconds: list[float], image: int) -> float:
    return sum(seconds[image * STEPS : (image + 1) * STEPS])


def _spread(values: list[float]) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


def measure_parts(tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Where a cached step and a refresh spend their time: each part compiled and timed alone, in alternation."""
    transformer = make_transformer(dim=512, double=4, single=8)
    inputs = _inputs(tokens, transformer.config.joint_attention_dim)
    config = dataclasses.replace(forced(1000), warmup_steps=1)
    schedules = schedule_steps(torch.linspace(1, 0, STEPS + 1), config)
    state, coupling = init_state(1, tokens, 512, config=config), solo(1)
    embedded = flux1.embed(transformer, inputs)
    velocity = flux1.head(transformer, embedded.hidden_states, embedded.temb)
    # The machinery of a step around a model that costs nothing.
    empty = Architecture(
        sizes=flux1.sizes,
        embed=lambda transformer, inputs: Embedded(inputs.hidden_states.clone(), inputs.temb.clone()),
        stack=lambda model, inputs, embedded: embedded.hidden_states + 1,
        head=lambda transformer, hidden_states, temb: hidden_states[..., :64].clone(),
        place=flux1.place,
    )

    def step_of(architecture: Architecture, writer: Any) -> CompiledStep:
        def run(inputs: Any, state: Any, schedule: Any) -> Any:
            return cached_forward(
                transformer,
                inputs,
                state,
                schedule,
                coupling,
                architecture=architecture,
                kernel=scaled_dot_product_attention,
                config=config,
                writer=writer,
            )

        return _compile(run)

    def alone(step: CompiledStep, *args: Any) -> Callable[[], Any]:
        """A call as the runtime makes it from an image's third step on."""
        step(*args)
        settled = step.without_guards(*args)
        return lambda: settled(*args)

    compiled, machinery, writing = step_of(flux1.FLUX, None), step_of(empty, None), step_of(empty, write_newest)
    embed = _compile(lambda inputs: flux1.embed(transformer, inputs))
    head = _compile(lambda hidden, temb: flux1.head(transformer, hidden, temb))
    row = _compile(lambda state, schedule: forecast.apply_row(forecast_row(state, schedule, config=config), state.history))
    forward = torch.compile(transformer.forward, fullgraph=True, **CompileOptions().tuning())
    _, state, _ = compiled(inputs, state, schedules[0])
    cached = schedules[3]
    arguments = flux1_inputs.host_arguments(inputs)
    parts: dict[str, Callable[[], Any]] = {
        "uncached step": lambda: forward(**arguments, return_dict=False),
        "refresh": alone(compiled, inputs, state, schedules[0]),
        "cached step": alone(compiled, inputs, state, cached),
        "the same with Dynamo's guards": lambda: compiled(inputs, state, cached),
        "embedding": alone(embed, inputs),
        _FORECAST: alone(row, state, cached),
        "head": alone(head, embedded.hidden_states, embedded.temb),
        _MACHINERY: alone(machinery, embedded, state, cached),
        "the same with the history written in place": alone(writing, embedded, state, cached),
        "a copy of the history alone": state.history.clone,
        "a copy of the velocity alone": velocity.clone,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for repeat in range(repeats + 3):
        for name, call in parts.items():
            started = time.perf_counter()
            call()
            if repeat >= 3:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shown = {name: _spread([1e3 * value for value in values]) for name, values in seconds.items()}
    outside = medians["embedding"] + medians["head"]
    differences = {
        "blocks (uncached step - embedding - head)": medians["uncached step"] - outside,
        "decision and statistics (machinery - forecast)": medians[_MACHINERY] - medians[_FORECAST],
        "dispatch (cached step - embedding - head - machinery)": medians["cached step"] - outside - medians[_MACHINERY],
    }
    medians |= differences
    shown |= {name: f"{1e3 * value:.3g}" for name, value in differences.items()}
    return [
        {
            "image tokens": tokens,
            "part": name,
            "milliseconds": shown[name],
            "% of a refresh": 100 * value / medians["refresh"],
        }
        for name, value in medians.items()
    ]


def _compile(function: Any) -> CompiledStep:
    return CompiledStep(function, torch.compile, CompileOptions())


def _inputs(tokens: int, dim: int) -> afcache.FluxInputs:
    side = int(tokens**0.5)
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(float(side)), torch.arange(float(side)))
    return afcache.FluxInputs(
        hidden_states=torch.randn(1, tokens, 64),
        encoder_hidden_states=torch.randn(1, TEXT_TOKENS, dim),
        pooled_projections=torch.randn(1, dim),
        timestep=torch.full((1,), 0.5),
        img_ids=positions,
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
        guidance=torch.full((1,), 3.5),
    )


_NOTES = {
    "steps": "Median (quartiles). float32, batch 1, 64 text tokens, 28 steps, 2 warmup steps. Efficiency: speed-up of the "
    "transformer's time over the compiled, uncached model, divided by what the skipped blocks promise; both are compiled "
    "with the same settings. Speed-up and efficiency are made of the medians of steps.",
    "parts": "Median (quartiles). float32, batch 1, 64 text tokens. Parts are compiled and timed alone, ours as the "
    "runtime calls them from an image's third step on: without guards. The last three rows are differences of medians.",
    "compile": "Each first call in a process of its own, caches off. No regional row for afcache: a region inside a branch of "
    "torch.cond fails in inductor (tests/contract/test_compile_contract_regions.py); a branch inside every region would "
    "compile, and wait for the device at every block instead of once a step.",
}
CONTENDERS = {
    "plain": "diffusers' forward, torch.compile(fullgraph=True)",
    "plain, regional": "diffusers' compile_repeated_blocks(fullgraph=True)",
    "afcache": "compile_pipeline",
}


def measure_compilation(blocks: list[tuple[int, int]], contenders: list[str], backend: str) -> Iterator[dict[str, Any]]:
    """Seconds of the first call, in a process of its own, without caches."""
    for double, single in blocks:
        seconds: dict[str, float] = {}
        for contender in contenders:
            arguments = ["first-call", "--contender", contender, "--blocks", str(double), str(single), "--backend", backend]
            result = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "bench.overhead", *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = result.stdout.strip().splitlines()
            is_measured = result.returncode == 0 and bool(lines)
            if is_measured:
                seconds[contender] = float(lines[-1])
            yield {
                "blocks": double + single,
                "contender": contender,
                "backend": backend,
                "first call (s)": seconds[contender] if is_measured else result.stderr.strip().splitlines()[-1],
                "of the plain model's": seconds[contender] / seconds["plain"] if {contender, "plain"} <= set(seconds) else "-",
            }


def first_call(contender: str, double: int, single: int, backend: str) -> float:
    """Seconds until the first call has returned, at hidden 128 and 64 image tokens."""
    torch.compiler.config.force_disable_caches = True
    transformer = make_transformer(dim=128, double=double, single=single)
    pipe = make_pipeline(transformer)
    if contender == "plain":
        transformer.compile(fullgraph=True, backend=backend)
    elif contender == "plain, regional":
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        afcache.compile_pipeline(pipe, backend=backend)
    inputs = _inputs(64, 128)
    pipe.scheduler.set_timesteps(STEPS)
    started = time.perf_counter()
    with torch.no_grad():
        timestep = pipe.scheduler.timesteps[:1] / 1000
        transformer(**flux1_inputs.host_arguments(inputs._replace(timestep=timestep)), return_dict=False)
    return time.perf_counter() - started


def main() -> None:
    """Run one of the three benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["steps", "parts", "compile", "first-call"])
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
        name, title = "overhead_steps_cpu_202611", "What a cached step costs, hidden 512, 4 + 8 blocks, random weights"
        rows = [row for tokens in arguments.tokens for row in measure_steps(tokens, arguments.intervals, arguments.rounds)]
    elif arguments.task == "parts":
        name, title = "overhead_parts_cpu_202611", "Where the time goes, hidden 512, 4 + 8 blocks, random weights"
        with torch.no_grad():
            rows = [row for tokens in arguments.tokens for row in measure_parts(tokens, 20 * arguments.rounds)]
    else:
        name, title = "overhead_compile_cpu_202611", "Cold compile: seconds of the first call, hidden 128, 64 image tokens"
        pairs = list(zip(arguments.blocks[::2], arguments.blocks[1::2], strict=True))
        rows = list(measure_compilation(pairs, list(CONTENDERS), arguments.backend))
    print(table(rows))
    notes = [_NOTES[arguments.task]]
    write_result(name, title, rows, notes=notes)


if __name__ == "__main__":
    main()
