"""Many settings at once: a grid of tolerances, growth limits and dampings is one batch, for each setting that is static."""

import contextlib
import dataclasses
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from afcache import CacheConfig
from afcache.functional import target
from bench.mini_flux import sampling
from bench.mini_flux.recipe import RECIPES
from bench.search import closed_loop
from bench.search.setting import AT_ONCE, Setting, repeat


class Kind(NamedTuple):
    """Settings that are the same for a whole batch.

    Attributes:
        name: as tables show it.
        config: with any tolerance, growth limit and damping.
        tau: the noise level at which target "noise" keeps where the path leads.

    """

    name: str
    config: CacheConfig
    tau: float = target.NOISE_LEVEL


class Cell(NamedTuple):
    """A place of the grid."""

    tolerance: float
    max_growth: float
    damping: float


class Found(NamedTuple):
    """What a cell came to.

    Attributes:
        kind, model, steps, cfg: what was drawn.
        tolerance, max_growth, damping: the cell.
        speed: times fewer refreshes.
        psnr, worst: mean and least over the seeds, dB.

    """

    kind: str
    model: str
    steps: int
    cfg: float
    tolerance: float
    max_growth: float
    damping: float
    speed: float
    psnr: float
    worst: float


class Grid:
    """Draws grids on one model, and appends what it finds to a file.

    Args:
        model: name of a recipe.
        seeds: of the images.
        path: JSON lines; what is there is not drawn again.
        device: to draw on.

    """

    def __init__(self, model: str, seeds: Sequence[int], path: Path, device: str = "cpu") -> None:
        self.recipe = RECIPES[model]
        self.seeds = tuple(seeds)
        self._path = path
        self._pipe = sampling.load(self.recipe).to(device)
        self._at_once = AT_ONCE[device]
        self._problems: dict[Setting, tuple[sampling.Prepared, Tensor]] = {}
        self._done = {(f.kind, f.steps, f.cfg) for f in read(path) if f.model == model}

    @torch.no_grad()
    def draw(self, kind: Kind, setting: Setting, cells: Sequence[Cell]) -> None:
        """Draw all seeds at every cell."""
        if (kind.name, *setting) in self._done:
            return
        problem, references = self._problem(setting)
        size = max(1, self._at_once // len(self.seeds))
        lines = []
        for some in _batched(cells, size):
            each = [dataclasses.replace(kind.config, **cell._asdict()) for cell in some for _ in self.seeds]
            with _noise_level(kind.tau):
                loop = closed_loop.sample(self._pipe.transformer, repeat(problem, len(some)), kind.config, each=each)
            refreshes = loop.refreshes.sum(0).reshape(len(some), -1).double()
            quality = psnr(self._decode(loop.latents).unflatten(0, (len(some), -1)), references)
            for index, cell in enumerate(some):
                speed = setting.steps / float(refreshes[index].mean())
                facts = {"kind": kind.name, "model": self.recipe.name, **setting._asdict(), **cell._asdict(), "speed": speed}
                lines.append(Found(**facts, psnr=float(quality[index].mean()), worst=float(quality[index].min())))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.writelines(json.dumps(found._asdict()) + "\n" for found in lines)
        self._done.add((kind.name, setting.steps, setting.cfg))

    def _problem(self, setting: Setting) -> tuple[sampling.Prepared, Tensor]:
        if setting not in self._problems:
            problem = sampling.prepare(self._pipe, self.seeds, steps=setting.steps, cfg=setting.cfg, recipe=self.recipe)
            self._problems[setting] = problem, self._decode(problem.latents)
        return self._problems[setting]

    def _decode(self, latents: Tensor) -> Tensor:
        parts = [sampling.decode(self._pipe, some, recipe=self.recipe) for some in latents.split(1024)]
        return torch.from_numpy(np.concatenate(parts))


def read(path: Path) -> list[Found]:
    """Everything that a file holds, packed or not; nothing where there is none."""
    if not path.exists():
        return []
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [Found(**json.loads(line)) for line in text.splitlines()]


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Of each image in [0, 1], `[..., height, width, 3]`, against its reference, in float64, 150 dB at most; `[...]`."""
    error = (images.double() - references.double()).square().flatten(-3).mean(-1)
    return -10 * torch.log10(error.clamp_min(1e-15))


def _batched(cells: Sequence[Cell], size: int) -> Iterator[tuple[Cell, ...]]:
    """itertools.batched, which Python 3.11 has not."""
    for start in range(0, len(cells), size):
        yield tuple(cells[start : start + size])


@contextlib.contextmanager
def _noise_level(tau: float) -> Iterator[None]:
    """Another tau, which is no setting: one value serves all models."""
    before = target.NOISE_LEVEL
    target.NOISE_LEVEL = tau
    try:
        yield
    finally:
        target.NOISE_LEVEL = before
