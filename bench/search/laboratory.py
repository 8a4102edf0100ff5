"""Evaluating policies on many seeds of mini-FLUX, and remembering every result."""

import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import afcache
from afcache import CacheConfig
from bench.mini_flux import sampling
from bench.mini_flux.evaluate import features, train_judge
from bench.record.naming import RUNS
from bench.search import closed_loop
from bench.search.curves import Point

KNOWN = RUNS / "evaluations.jsonl"


class Setting(NamedTuple):
    """How long and how guided."""

    steps: int
    cfg: float

    def __str__(self) -> str:
        return f"{self.steps} steps, CFG {self.cfg:g}"


class Laboratory:
    """Evaluates policies on fixed seeds, and remembers every result in a file.

    Args:
        seeds: of the images.
        runs: the file.

    """

    def __init__(self, seeds: Sequence[int], runs: Path = KNOWN) -> None:
        self.seeds = tuple(seeds)
        self._runs = runs
        self._pipe = sampling.load()
        self._problems: dict[Setting, tuple[sampling.Prepared, np.ndarray]] = {}
        lines = runs.read_text().splitlines(keepends=True) if runs.exists() else []
        if lines and not lines[-1].endswith("\n"):
            # A run that was killed while it wrote: what it left is measured again.
            runs.write_text("".join(lines[:-1]))
            lines.pop()
        self._known = {entry.pop("key"): _read_point(entry) for entry in map(json.loads, lines)}

    def evaluate(self, config: CacheConfig, setting: Setting, *, use_surprise: bool = False) -> Point:
        """Sample all seeds, or read what an earlier run found."""
        settings = {k: v for k, v in config.to_dict().items() if v != getattr(CacheConfig(), k)}
        # Infinity is not JSON.
        facts = {**settings, "max_growth": str(config.max_growth), "surprise": use_surprise, **setting._asdict()}
        return self._remember(facts, lambda: self._sample(config, setting, use_surprise=use_surprise))

    def fewer_steps(self, steps: int, setting: Setting) -> Point:
        """The control that caches nothing: the same noise, walked in fewer steps."""

        def sample() -> Point:
            problem = sampling.prepare(self._pipe, self.seeds, steps=steps, cfg=setting.cfg)
            speed = setting.steps / steps
            return self._measure(problem.latents, setting, speed=speed, flops=speed)

        return self._remember({"fewer steps": steps, **setting._asdict()}, sample)

    def _key(self, facts: dict[str, Any]) -> str:
        return json.dumps({**facts, "seeds": [self.seeds[0], self.seeds[-1]]}, sort_keys=True)

    def _remember(self, facts: dict[str, Any], sample: Any) -> Point:
        key = self._key(facts)
        if key not in self._known:
            point = self._known[key] = sample()
            self._runs.parent.mkdir(parents=True, exist_ok=True)
            with self._runs.open("a") as file:
                file.write(json.dumps({"key": key, **point._asdict()}) + "\n")
        return self._known[key]

    def _sample(self, config: CacheConfig, setting: Setting, *, use_surprise: bool) -> Point:
        problem, _ = self._problem(setting)
        loop = closed_loop.sample(self._pipe.transformer, problem, config, use_surprise=use_surprise)
        whole, alone = block_flops(self._pipe.transformer, problem.branches[0])
        calls = loop.refreshes.numel() * len(problem.branches)
        ran = int(loop.runs.sum() + loop.mlp_runs.sum())
        operations = float(loop.runs.double() @ whole + loop.mlp_runs.double() @ alone)
        return self._measure(
            loop.latents, setting, speed=calls * len(whole) / ran, flops=calls * float(whole.sum()) / operations
        )

    def _measure(self, latents: torch.Tensor, setting: Setting, *, speed: float, flops: float) -> Point:
        _, references = self._problem(setting)
        images = sampling.decode(self._pipe, latents)
        pairs = list(zip(images, references, strict=True))
        judged = _judge().predict(features(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1))
        return Point(
            speed=speed,
            psnr=tuple(round(min(afcache.psnr(a, b), 150.0), 3) for a, b in pairs),
            flops=flops,
            ssim=statistics.mean(afcache.ssim(a, b) for a, b in pairs),
            accuracy=float((judged == np.array(self.seeds) % 10).mean()),
        )

    def _problem(self, setting: Setting) -> tuple[sampling.Prepared, np.ndarray]:
        if setting not in self._problems:
            problem = sampling.prepare(self._pipe, self.seeds, steps=setting.steps, cfg=setting.cfg)
            self._problems[setting] = problem, sampling.decode(self._pipe, problem.latents)
        return self._problems[setting]


@functools.cache
def _judge() -> Any:
    return train_judge()[0]


def _read_point(entry: dict[str, Any]) -> Point:
    return Point(**{**entry, "psnr": tuple(entry["psnr"])})


def block_flops(transformer: Any, inputs: afcache.FluxInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiplications and additions of each block for one sample, in whole and without its attention; float64 `[blocks]`.

    Linear layers count 2 in out a token (a vector's own, in the modulation, once), attention 4 seq^2 dim.
    """
    img_seq, txt_seq = inputs.hidden_states.shape[1], inputs.encoder_hidden_states.shape[1]
    seq, dim = img_seq + txt_seq, transformer.inner_dim
    attention = 4 * seq**2 * dim
    whole, alone = [], []
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        total = projections = 0
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                tokens = seq
                if "norm" in name:
                    tokens = 1
                elif hasattr(block, "ff"):
                    is_text = "context" in name or "add" in name
                    tokens = txt_seq if is_text else img_seq
                count = 2 * module.in_features * module.out_features * tokens
                total += count
                projections += count if name.startswith("attn.") else 0
        whole.append(total + attention)
        alone.append(total - projections)
    return torch.tensor(whole, dtype=torch.float64), torch.tensor(alone, dtype=torch.float64)
