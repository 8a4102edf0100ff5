"""Models that people run, at their real sizes on a GPU: what steps cost plain, under AFCache, and under other caches.

    python -m bench.real_models qwen_image                    # random weights: costs, never quality
    python -m bench.real_models wan21_1_3b --steps 12 --rounds 1
    python -m bench.real_models flux2 --whole                 # with the whole step as one graph, too
    python -m bench.real_models z_image --small --device cpu --backend aot_eager

Every contender runs the pipeline that users call, one after the other in one process, and refreshes at the same steps where it
can be told to. Tables are written after every row.
"""

import argparse
import dataclasses
import gc
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch

import afcache
from bench.models.real_pipelines import REAL_PIPELINES, RealPipeline
from bench.race.contender import Contender
from bench.race.peers import peers
from bench.race.subjects import Task
from bench.record.clock import seconds_of
from bench.record.naming import RESULTS
from bench.record.recording import write_result
from bench.record.render import table
from bench.record.spread import shown_spread
from bench.scale.real_subject import Subject

_WARMUP = 2
# Of the images that are compared with those of the plain model.
_EQUAL_STEPS = 4
# One of each cache of others, as the race has them; those that other modules bring change classes, and come last.
_PEERS = ("FirstBlockCache 0.12", "MagCache 0.12", "TaylorSeer lite every 4 after 2", "cache-dit + TaylorSeer 0.24")
Row = dict[str, Any]


class Way(NamedTuple):
    """A way to run the pipeline.

    Attributes:
        name: as tables show it.
        switch_on, switch_off: it.
        pattern: `() -> "F" and "." of the last image's steps`; None where the blocks themselves are watched.

    """

    name: str
    switch_on: Callable[[], None]
    switch_off: Callable[[], None]
    pattern: Callable[[], str] | None


def forced(steps: int, interval: int) -> str:
    """Two steps of warmup, and then a refresh every `interval` steps."""
    return "".join("F" if step < _WARMUP or (step - _WARMUP + 1) % interval == 0 else "." for step in range(steps))


def ways(subject: Subject, task: Task, pattern: str) -> Iterator[Way]:
    """All of them; the plain ones first."""
    pipe, backend = subject.pipe, subject.arguments.backend
    settings = dataclasses.replace(
        afcache.PRESETS["balanced"],
        policy="planned",
        refresh_steps=tuple(step for step, letter in enumerate(pattern) if letter == "F"),
    )

    def compile_blocks() -> None:
        subject.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)

    def forget_blocks() -> None:
        forget_compiled(subject.transformer)

    def ours(how: Any) -> Way:
        name = {False: "AFCache, eager", "blocks": "AFCache, blocks compiled", "step": "AFCache, one graph"}[how]

        def switch_off() -> None:
            afcache.restore_pipeline(pipe)
            forget_blocks()

        options = {} if how is False else {"backend": backend}
        return Way(
            name,
            lambda: afcache.compile_pipeline(pipe, settings, compile=how, **options),
            switch_off,
            lambda: afcache.report(pipe).pattern(),
        )

    def always() -> str:
        return "F" * len(pattern)

    yield Way("plain, eager", lambda: None, lambda: None, always)
    yield ours(False)
    yield Way("plain, blocks compiled", compile_blocks, forget_blocks, always)
    yield ours("blocks")
    if subject.arguments.whole:
        yield ours("step")
    everybody = {contender.name: contender for contender in peers()}
    for name in _PEERS:
        found = next(contender for key, contender in everybody.items() if key.endswith(name))
        yield _of_others(found, pipe, task, pattern)


def _of_others(contender: Contender, pipe: Any, task: Task, pattern: str) -> Way:
    def switch_on() -> None:
        if contender.force is None:
            contender.enable(pipe, task)
        else:
            contender.force(pipe, pattern)

    def switch_off() -> None:
        if contender.module == "diffusers":
            pipe.transformer.disable_cache()
        for name in ("step", "set_begin_index"):
            vars(pipe.scheduler).pop(name, None)

    return Way(f"{contender.name}, eager", switch_on, switch_off, None)


def row_of(subject: Subject, way: Way, plain: dict[str, list[float]]) -> Row:
    """Switch one on, draw, and switch it off."""
    arguments = subject.arguments
    subject.peak()
    way.switch_on()
    try:
        _, first = seconds_of(lambda: subject.draw(_EQUAL_STEPS), arguments.device)
        if way.pattern is None:
            with subject.watched() as letters:
                subject.draw(arguments.steps)
            pattern = "".join(letters[:: len(letters) // arguments.steps])
        else:
            pattern = ""
        parts, whole = subject.images(arguments.rounds, arguments.steps)
        pattern = way.pattern() if way.pattern else pattern
        peak = subject.peak()
    finally:
        way.switch_off()
        gc.collect()
    kinds = {letter: [image[i] for image in parts for i, kind in enumerate(pattern) if kind == letter] for letter in "F."}
    mode = "plain, blocks compiled" if "compiled" in way.name or "graph" in way.name else "plain, eager"
    plain.setdefault(way.name, whole)
    speed = statistics.median(plain[mode]) / statistics.median(whole) if mode in plain else None
    promised = len(pattern) / pattern.count("F")
    return {
        "contender": way.name,
        "first call (s)": first,
        "refresh (ms)": shown_spread(kinds["F"], scale=1e3),
        "cached step (ms)": shown_spread(kinds["."], scale=1e3),
        "of a refresh (%)": 100 * statistics.median(kinds["."]) / statistics.median(kinds["F"]) if kinds["."] else "-",
        "image (s)": statistics.median(whole),
        "speed-up": "-" if speed is None else speed,
        "promised": promised,
        "efficiency": "-" if speed is None else speed / promised,
        "peak (MiB)": "-" if peak is None else peak,
        "pattern": pattern,
        "note": "",
    }


def equality(subject: Subject, backend: str) -> Row:
    """Tolerance 0 with compiled blocks against the plain model, eager; what compiling alone changes is the yardstick."""
    theirs = subject.draw(_EQUAL_STEPS).float()

    def distance() -> float:
        return float((subject.draw(_EQUAL_STEPS).float() - theirs).norm() / theirs.norm())

    zero = afcache.CacheConfig(target="noise", tolerance=0.0)
    found: Row = {}
    try:
        subject.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        found["compiling alone"] = distance()
        forget_compiled(subject.transformer)
        afcache.compile_pipeline(subject.pipe, zero, compile=False)
        found["AFCache at tolerance 0, eager"] = distance()
        afcache.compile_pipeline(subject.pipe, zero, compile="blocks", backend=backend)
        found["AFCache at tolerance 0, blocks compiled"] = distance()
    finally:
        afcache.restore_pipeline(subject.pipe)
        forget_compiled(subject.transformer)
    return found


def forget_compiled(transformer: Any) -> None:
    """Let every block be what it was."""
    for module in transformer.modules():
        module._compiled_call_impl = None
    torch._dynamo.reset()


def measure(name: str, arguments: argparse.Namespace) -> None:
    """Run everybody, and write the table after every row."""
    model = REAL_PIPELINES[name]
    subject, seconds = seconds_of(lambda: Subject(model, arguments), arguments.device)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in subject.transformer.parameters()) / 2**30
    pattern = forced(arguments.steps, arguments.interval)
    task = Task(f"random:{name}", arguments.steps, device=arguments.device, backend=arguments.backend)
    with torch.no_grad():
        same = _attempt(lambda: equality(subject, arguments.backend))
    print({key: f"{value:.3g}" if isinstance(value, float) else value for key, value in same.items()}, flush=True)
    rows: list[Row] = []
    plain: dict[str, list[float]] = {}
    for way in ways(subject, task, pattern):
        row = _attempt(lambda way=way: row_of(subject, way, plain))
        rows.append({"contender": way.name, **row})
        print({key: value for key, value in rows[-1].items() if value not in ("-", "")}, flush=True)
        _write(name, model, rows, same, arguments, f"{weights:.1f} GiB of weights, made in {seconds:.0f} s")
    print(table(_shown(rows)))


def _attempt(action: Callable[[], Row]) -> Row:
    """What it measured, or why it failed, in one line."""
    try:
        return action()
    except Exception as error:
        return {"note": f"failed: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"}


def _shown(rows: Sequence[Row]) -> list[Row]:
    columns = max(rows, key=len)
    return [{key: row.get(key, "-") for key in columns} for row in rows]


def _write(name: str, model: RealPipeline, rows: list[Row], same: Row, arguments: argparse.Namespace, weights: str) -> None:
    notes = [
        f"Random weights, bfloat16, {weights}; {arguments.steps} steps, {arguments.rounds} images of each contender after one "
        f"of {_EQUAL_STEPS} steps that warms up, backend {arguments.backend}. Median (quartiles; of fewer than five the lowest "
        "and the highest) of the transformer's steps, all of its calls. Costs, never quality.",
        "Refreshes are forced where a contender can be told to; the pattern is what its blocks did. Speed-up: images, over the "
        "plain model of the same mode; promised: steps over refreshes. First calls compile, with what is cached from before.",
        f"Latents after {_EQUAL_STEPS} steps, relative L2 from the plain eager model's: "
        + (same.get("note") or ", ".join(f"{key} {value:.3g}" for key, value in same.items()))
        + ".",
    ]
    subject = f"real_models_{name}{'_small' if arguments.small else ''}"
    where: dict[str, Any] = {"device": arguments.device, "folder": arguments.output}
    write_result(subject, f"{model.title}: what steps cost", _shown(rows), notes=notes, **where)


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", choices=REAL_PIPELINES)
    add("--steps", type=int, default=28, help="of an image or clip (default 28)")
    add("--interval", type=int, default=4, help="steps from refresh to refresh (default 4)")
    add("--rounds", type=int, default=2, help="images of each contender (default 2)")
    add("--whole", action="store_true", help="compile the whole step as one graph, too, which takes minutes")
    add("--small", action="store_true", help="a small model of the same family, to see that it runs")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="to measure on (default cuda)")
    add("--backend", default="inductor", help="of torch.compile")
    add("--output", type=Path, default=RESULTS, help="folder of the tables")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. Use --device cpu --small to see that it runs.")
    measure(arguments.model, arguments)


if __name__ == "__main__":
    main()
