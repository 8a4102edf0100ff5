"""`bench/full_size.py --gpu`: what FLUX.1-dev's steps cost on a device, with random weights of its exact shape.

One process, one set of weights. Everything has a place in a time budget, and what no longer fits is named in its table.
Tables are written after every row, and what may take longest comes last.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import afcache
from afcache.functional.model import model_of, scaled_dot_product_attention
from afcache.functional.outputs import full_forward
from afcache.models.flux1 import architecture as flux1
from afcache.models.flux1 import inputs as flux1_inputs
from bench.models.random_flux import SIZES
from bench.record.clock import seconds_of
from bench.record.spread import shown_spread
from bench.scale.full_size_rows import EQUALITY, FEW, STEP, UNKNOWN, VARIANT, Row, at_most, difference
from bench.scale.full_size_subject import INTERVAL, Shape, Subject, cached, decide, force, plain, regional
from bench.scale.full_size_tables import Tables
from bench.scale.step_costs import by_kind, gain

# Steps of the images that are compared with diffusers'.
_EQUAL_STEPS = 4
# Estimates, until the first compilation has been timed: of a block; and of what a row takes beside its compilation.
_SECONDS_A_BLOCK = {"cuda": 2.0, "cpu": 0.0}
_SECONDS_A_ROW = {"cuda": 20.0, "cpu": 0.0}
# A mode that autotunes tries some twenty kernels for each product of other sizes: on an H200 150 s were not enough.
_SECONDS_TO_TUNE = {"cuda": 240.0, "cpu": 0.0}


class Variant(NamedTuple):
    """AFCache on few blocks.

    Attributes:
        shape: of the images.
        mode: of torch.compile.
        decisions: one or two of "forced" and "live", in one graph, or "ahead".

    """

    shape: Shape
    mode: str | None
    decisions: tuple[str, ...]

    @property
    def is_tuned(self) -> bool:
        """Whether compiling it takes minutes."""
        return (self.mode or "").startswith("max-autotune")


class Bench:
    """All there is to measure.

    Args:
        arguments: of the command line.

    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.started = time.monotonic()
        self.arguments = arguments
        self.tables = Tables(arguments)
        self.size = SIZES[arguments.size]
        self.shape = Shape(16 * int(self.size.tokens**0.5), 1)
        self.row_seconds = _SECONDS_A_ROW[arguments.device]
        self.compile_seconds = _SECONDS_A_BLOCK[arguments.device] * (self.size.double + self.size.single)
        self.plain_first: float | None = None
        self.plain_steps: list[float] = []
        self.plain_peak: float | None = None
        self.plain_latents: Tensor | None = None
        self.eager_latents: Tensor | None = None
        self.whole: dict[Shape, float] = {}
        self.subject = Subject(self.size, arguments.device, arguments.target)
        self.few: Subject | None = None

    def attempt(self, name: str, row: Row, seconds: float, measure: Callable[[], Iterator[Row]]) -> None:
        """Add a measurement to a table; where it does not fit into the budget, or fails on its way, a row that says so."""
        left = 60 * self.arguments.minutes - (time.monotonic() - self.started)
        if left < seconds:
            reason = f"{UNKNOWN}: {max(left, 0):.0f} s of the time budget left, about {seconds:.0f} s needed"
            self.tables.add(name, {**row, "note": reason})
            return
        try:
            for measured in measure():
                self.tables.add(name, {**row, **measured})
        except Exception as error:
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            self.tables.add(name, {**row, "note": f"failed: {type(error).__name__}: {reason}"})

    def images(self, subject: Subject, shape: Shape) -> tuple[list[float], float]:
        """Seconds of every call of several images, and of the median image with everything around the transformer."""
        arguments, steps, whole = self.arguments, self.arguments.steps, []
        subject.draw(shape, steps)
        subject.seconds()
        for _ in range(arguments.rounds):
            subject.wait()
            whole.append(seconds_of(lambda: subject.draw(shape, steps), arguments.device)[1])
        return subject.seconds(), statistics.median(whole)

    @torch.no_grad()
    def equal_forward(self) -> Iterator[Row]:
        """One forward, nothing compiled: ours without a cache against diffusers'."""
        transformer = self.subject.transformer
        inputs = self.subject.inputs(self.shape)
        theirs = transformer(**flux1_inputs.host_arguments(inputs), return_dict=False)[0]
        self.subject.seconds()
        ours = full_forward(model_of(transformer, flux1.FLUX, scaled_dot_product_attention), inputs)
        yield {"ours": "one forward, eager", "theirs": "diffusers, eager", **difference(ours, theirs)}
        self.eager_latents = self.subject.draw(self.shape, _EQUAL_STEPS)
        self.subject.seconds()

    def plain_rows(self) -> Iterator[Row]:
        """The plain model, compiled whole: what everything else is compared with."""
        subject, arguments = self.subject, self.arguments
        with plain(subject, arguments.backend):
            self.plain_first = self.compile_seconds = subject.first_call(self.shape)
            self.plain_latents = subject.draw(self.shape, _EQUAL_STEPS)
            self.plain_steps, seconds = self.images(subject, self.shape)
            self.plain_peak = subject.peak(self.shape, arguments.steps)
            waits = subject.waits(self.shape, arguments.profiled)
        yield {
            "first call (s)": self.plain_first,
            "of the plain model's": 1.0,
            "plain step or refresh (ms)": shown_spread(self.plain_steps, scale=1e3),
            "image (s)": seconds,
            "waits of a step": at_most(waits),
        }

    def regional_rows(self) -> Iterator[Row]:
        """The plain model, compiled block by block."""
        with regional(self.subject, self.arguments.backend):
            first = self.subject.first_call(self.shape)
            steps, seconds = self.images(self.subject, self.shape)
        yield {
            "first call (s)": first,
            "plain step or refresh (ms)": shown_spread(steps, scale=1e3),
            "image (s)": seconds,
        } | self._of_plain(first)

    def cached_rows(self, *, ahead: bool = False, around: str = "step") -> Iterator[Row]:
        """AFCache with forced refreshes, and, in the same graph, with live decisions; or decisions made ahead.

        Args:
            ahead: the latter.
            around: what is compiled: "step", or "blocks", which makes its decisions ahead in any case.

        """
        subject, arguments = self.subject, self.arguments
        options = {"decide_ahead": ahead} if around == "step" else {"compile": around}
        with cached(subject, arguments.backend, **options):
            first = subject.first_call(self.shape)
            if not ahead:
                decide(subject, dataclasses.replace(subject.config, tolerance=0.0))
                name = "tolerance 0, compiled" if around == "step" else "tolerance 0, compiled block by block"
                self._compare(name, subject.draw(self.shape, _EQUAL_STEPS))
                force(subject, arguments.steps)
                yield {"decisions": f"forced, every {INTERVAL}", **self._facts(first)}
            decide(subject)
            yield {"decisions": "ahead" if ahead else "live", **self._facts(first)}

    def _compare(self, name: str, latents: Tensor) -> None:
        """Against plain images of as many steps; what compiling alone changes is the yardstick."""
        self.subject.seconds()
        if self.plain_latents is None:
            return
        theirs = f"plain, compiled, {_EQUAL_STEPS} steps"
        ours = {"ours": name, "theirs": theirs}
        self.tables.add("equality", {**EQUALITY, **ours, **difference(latents, self.plain_latents)})
        if self.eager_latents is not None and not any(
            row["ours"].endswith("yardstick)") for row in self.tables.rows["equality"]
        ):
            yardstick = {"ours": "plain, eager (the yardstick)", "theirs": theirs}
            self.tables.add("equality", {**EQUALITY, **yardstick, **difference(self.eager_latents, self.plain_latents)})

    def _facts(self, first: float) -> Row:
        """A row of the steps' table, of the cached subject as it is set."""
        subject, arguments = self.subject, self.arguments
        steps, seconds = self.images(subject, self.shape)
        pattern = afcache.report(subject.pipe).pattern()
        refreshes, reused = by_kind(steps, pattern)
        peak = subject.peak(self.shape, arguments.steps)
        row = {
            "first call (s)": first,
            "plain step or refresh (ms)": shown_spread(refreshes, scale=1e3),
            "cached step (ms)": shown_spread(reused, scale=1e3),
            "image (s)": seconds,
            "waits of a step": at_most(subject.waits(self.shape, arguments.profiled)),
            "MiB over plain": UNKNOWN if peak is None or self.plain_peak is None else peak - self.plain_peak,
            "pattern": pattern,
        }
        if reused:
            row["cached / refresh (%)"] = 100 * statistics.median(reused) / statistics.median(refreshes)
        if self.plain_steps:
            row |= gain(self.plain_steps, refreshes, reused)
        return row | self._of_plain(first)

    def _of_plain(self, first: float) -> Row:
        return {"of the plain model's": UNKNOWN if self.plain_first is None else first / self.plain_first}

    def shape_seconds(self, shape: Shape) -> Iterator[Row]:
        """A plain step of all blocks, compiled block by block, at one shape."""
        with regional(self.subject, self.arguments.backend):
            self.subject.first_call(shape)
            self.subject.draw(shape, _EQUAL_STEPS)
            self.subject.seconds()
            self.subject.draw(shape, _EQUAL_STEPS)
            seconds = self.subject.seconds()
        self.whole[shape] = 1e3 * statistics.median(seconds)
        yield {"plain step, all blocks (ms)": self.whole[shape]}

    def variant_rows(self, variant: Variant, whole: float | None) -> Iterator[Row]:
        """AFCache on few blocks: what a cached step costs at another shape, in another mode, decided in another way."""
        arguments, shape = self.arguments, variant.shape
        if self.few is None:
            self.few = Subject(self.size._replace(double=FEW.double, single=FEW.single), arguments.device, arguments.target)
        few = self.few
        with cached(few, arguments.backend, mode=variant.mode, decide_ahead="ahead" in variant.decisions):
            first = few.first_call(shape)
            for decisions in variant.decisions:
                if decisions == "forced":
                    force(few, arguments.steps)
                else:
                    decide(few)
                steps, seconds = self.images(few, shape)
                pattern = afcache.report(few.pipe).pattern()
                _, reused = by_kind(steps, pattern)
                row = {
                    "decisions": decisions,
                    "first call (s)": first,
                    "cached step (ms)": shown_spread(reused, scale=1e3),
                    "image (s)": seconds,
                }
                if whole is not None and reused:
                    row["cached / plain (%)"] = 1e5 * statistics.median(reused) / whole
                yield row | {"pattern": pattern, "waits of a step": at_most(few.waits(shape, arguments.profiled))}

    def variant(self, variant: Variant) -> None:
        """Add the rows of one variant."""
        shape, whole = variant.shape, self.whole.get(variant.shape)
        row = {**VARIANT, "pixels": shape.pixels, "batch": shape.batch, "mode": variant.mode or "default"}
        row |= {"decisions": ", ".join(variant.decisions), "plain step, all blocks (ms)": whole or UNKNOWN}
        seconds = self.row_seconds + (_SECONDS_TO_TUNE[self.arguments.device] if variant.is_tuned else 0)
        self.attempt("variants", row, seconds, lambda: self.variant_rows(variant, whole))

    def run(self) -> None:
        """Measure everything that fits."""
        names = ("plain, compiled", "plain, regional", "AFCache", "AFCache, blocks")
        whole, by_block, ours, around = ({**STEP, "contender": name} for name in names)
        seconds = 1.6 * self.compile_seconds + self.row_seconds
        asked = self.arguments.contenders
        if "plain" in asked:
            self.attempt("equality", EQUALITY, self.row_seconds, self.equal_forward)
            self.attempt("steps", whole, self.compile_seconds + self.row_seconds, self.plain_rows)
        if "regional" in asked:
            self.attempt("steps", by_block, 2 * self.row_seconds, self.regional_rows)
        if "blocks" in asked and self.arguments.target != "residual":
            self.attempt("steps", around, 2 * self.row_seconds, lambda: self.cached_rows(around="blocks"))
        if "step" in asked:
            self.attempt("steps", ours, seconds, self.cached_rows)
        modes = self.arguments.modes if "variants" in asked else ()
        variants = [Variant(self.shape, mode, ("forced",)) for mode in modes]
        if "variants" in asked:
            self._run_variants([variant for variant in variants if not variant.is_tuned])
        if "ahead" in asked:
            ahead = {**ours, "decisions": "ahead"}
            self.attempt("steps", ahead, seconds, lambda: self.cached_rows(ahead=True))
        for variant in variants:
            if variant.is_tuned:
                self.variant(variant)
        self.tables.finish()

    def _run_variants(self, in_other_modes: list[Variant]) -> None:
        shapes = self.arguments.shapes
        for shape in (self.shape, *shapes):
            row = {**VARIANT, "pixels": shape.pixels, "batch": shape.batch}
            self.attempt("variants", row, self.row_seconds, lambda shape=shape: self.shape_seconds(shape))
        variants = [Variant(self.shape, None, decisions) for decisions in (("forced", "live"), ("ahead",))]
        variants += [Variant(shape, None, ("forced",)) for shape in shapes]
        for variant in variants + in_other_modes:
            self.variant(variant)
        # What is measured next counts memory.
        self.few = None


def measure(arguments: argparse.Namespace) -> None:
    """Run everything that fits; tables are written on the way."""
    Bench(arguments).run()
