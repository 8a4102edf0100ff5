"""Evaluating policies on many seeds of a small model, and remembering every result."""

import dataclasses
import functools
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import TaylorSeerCacheConfig

import afcache
from afcache import CacheConfig
from afcache.settings.changes import OPEN
from bench.mini_flux import sampling
from bench.mini_flux.evaluate import train_judge
from bench.mini_flux.recipe import MINI_FLUX, RECIPES, Recipe
from bench.record.naming import RUNS
from bench.search import closed_loop
from bench.search.curves import Point
from bench.search.setting import AT_ONCE, Setting, repeat

KNOWN = RUNS / "evaluations.jsonl"
# One value for what may differ within a batch.
_CLOSED: dict[str, Any] = {name: getattr(CacheConfig(), name) for name in OPEN}


class Laboratory:
    """Evaluates policies on fixed seeds, and remembers every result in a file.

    Args:
        seeds: of the images.
        runs: the file.
        more: further files, which are read.
        recipe: of the model.
        device: to draw on.

    """

    def __init__(
        self,
        seeds: Sequence[int],
        runs: Path = KNOWN,
        *,
        more: Sequence[Path] = (),
        recipe: Recipe = MINI_FLUX,
        device: str = "cpu",
    ) -> None:
        self.seeds = tuple(seeds)
        self.recipe = recipe
        self._runs = runs
        self._device = device
        self._pipe = sampling.load(recipe).to(device)
        self._problems: dict[Setting, tuple[sampling.Prepared, np.ndarray]] = {}
        lines = runs.read_text().splitlines(keepends=True) if runs.exists() else []
        if lines and not lines[-1].endswith("\n"):
            # A run that was killed while it wrote: what it left is measured again.
            runs.write_text("".join(lines[:-1]))
            lines.pop()
        lines += [line for path in more for line in path.read_text().splitlines()]
        self._known = {entry.pop("key"): _read_point(entry) for entry in map(json.loads, lines)}

    def evaluate(self, config: CacheConfig, setting: Setting, *, use_surprise: bool = False) -> Point:
        """Sample all seeds, or read what an earlier run found."""
        facts = _facts(config, setting, use_surprise=use_surprise)
        return self._remember(facts, lambda: self._sample([config], setting, use_surprise=use_surprise)[0])

    def evaluate_all(self, configs: Sequence[CacheConfig], setting: Setting) -> list[Point]:
        """The same of many settings: those that differ in nothing static are drawn as one batch."""
        kinds: dict[CacheConfig, list[CacheConfig]] = {}
        for config in configs:
            if self._key(_facts(config, setting)) not in self._known:
                # Blocks are counted for a batch together, so one whose groups or ends run by themselves is drawn alone.
                is_whole = config.rule.is_error_controlled and config.layerwise is None and not config.runs_sections
                kinds.setdefault(dataclasses.replace(config, **_CLOSED) if is_whole else config, []).append(config)
        size = max(1, AT_ONCE[self._device] // len(self.seeds))
        for same in kinds.values():
            for start in range(0, len(same), size):
                some = same[start : start + size]
                for config, point in zip(some, self._sample(some, setting), strict=True):
                    self._remember(_facts(config, setting), lambda point=point: point)
        return [self.evaluate(config, setting) for config in configs]

    def fewer_steps(self, steps: int, setting: Setting) -> Point:
        """The control that caches nothing: the same noise, walked in fewer steps."""

        def sample() -> Point:
            problem = sampling.prepare(self._pipe, self.seeds, steps=steps, cfg=setting.cfg, recipe=self.recipe)
            speed = setting.steps / steps
            return self._measure(problem.latents, setting, speed=speed, flops=speed)

        return self._remember({"fewer steps": steps, **setting._asdict()}, sample)

    def taylorseer_lite(self, interval: int, warmup: int, setting: Setting) -> Point:
        """Diffusers' own TaylorSeer in its lite mode, in float32; block evaluations are counted where they happen."""

        def sample() -> Point:
            transformer, counts = self._pipe.transformer, [0]
            config = TaylorSeerCacheConfig(
                cache_interval=interval,
                disable_cache_before_step=warmup,
                taylor_factors_dtype=torch.float32,
                use_lite_mode=True,
            )
            # A block's own forward is what the cache stands for; what is inside of it runs where the block does.
            inside = transformer.single_transformer_blocks[-1].attn
            hook = inside.register_forward_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
            transformer.enable_cache(config)
            try:
                problem = sampling.prepare(self._pipe, self.seeds, steps=setting.steps, cfg=setting.cfg, recipe=self.recipe)
            finally:
                transformer.disable_cache()
                hook.remove()
            speed = setting.steps * (2 if setting.cfg > 1 else 1) / counts[0]
            return self._measure(problem.latents, setting, speed=speed, flops=speed)

        return self._remember({"TaylorSeer lite": [interval, warmup], **setting._asdict()}, sample)

    def _key(self, facts: dict[str, Any]) -> str:
        model = {} if self.recipe is MINI_FLUX else {"model": self.recipe.name}
        return json.dumps({**facts, **model, "seeds": [self.seeds[0], self.seeds[-1]]}, sort_keys=True)

    def _remember(self, facts: dict[str, Any], sample: Any) -> Point:
        key = self._key(facts)
        if key not in self._known:
            point = self._known[key] = sample()
            self._runs.parent.mkdir(parents=True, exist_ok=True)
            with self._runs.open("a") as file:
                file.write(json.dumps({"key": key, **point._asdict()}) + "\n")
        return self._known[key]

    def _sample(self, configs: Sequence[CacheConfig], setting: Setting, *, use_surprise: bool = False) -> list[Point]:
        """Points of settings that differ in nothing static; of several, their stack is forecast as a whole."""
        problem, _ = self._problem(setting)
        whole, alone = block_flops(self._pipe.transformer, problem.branches[0])
        branches, blocks = len(problem.branches), len(whole)
        each = [config for config in configs for _ in self.seeds]
        loop = closed_loop.sample(
            self._pipe.transformer, repeat(problem, len(configs)), configs[0], each=each, use_surprise=use_surprise
        )
        points = []
        for index, latents in enumerate(loop.latents.split(len(self.seeds))):
            own = loop.refreshes.unflatten(1, (len(configs), -1))[:, index]
            calls = own.numel() * branches
            # What several settings run is counted together; alone, a stack that is forecast as a whole runs at refreshes.
            runs = loop.runs if len(configs) == 1 else own.sum() * branches * torch.ones(blocks, dtype=torch.int64)
            ran = int(runs.sum() + loop.mlp_runs.sum())
            operations = float(runs.double() @ whole + loop.mlp_runs.double() @ alone)
            flops = calls * float(whole.sum()) / operations
            points.append(self._measure(latents, setting, speed=calls * blocks / ran, flops=flops))
        return points

    def _measure(self, latents: torch.Tensor, setting: Setting, *, speed: float, flops: float) -> Point:
        _, references = self._problem(setting)
        images = sampling.decode(self._pipe, latents, self.recipe)
        pairs = list(zip(images, references, strict=True))
        judged = _judge(self.recipe.name).predict(self.recipe.features(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1))
        return Point(
            speed=speed,
            psnr=tuple(round(min(afcache.psnr(a, b), 150.0), 3) for a, b in pairs),
            flops=flops,
            ssim=statistics.mean(afcache.ssim(a, b) for a, b in pairs),
            accuracy=float((judged == np.array([self.recipe.subject_of(seed) for seed in self.seeds])).mean()),
        )

    def _problem(self, setting: Setting) -> tuple[sampling.Prepared, np.ndarray]:
        if setting not in self._problems:
            problem = sampling.prepare(self._pipe, self.seeds, steps=setting.steps, cfg=setting.cfg, recipe=self.recipe)
            self._problems[setting] = problem, sampling.decode(self._pipe, problem.latents, self.recipe)
        return self._problems[setting]


@functools.cache
def _judge(name: str) -> Any:
    return train_judge(RECIPES[name])[0]


def _facts(config: CacheConfig, setting: Setting, *, use_surprise: bool = False) -> dict[str, Any]:
    """What names an evaluation."""
    settings = {k: v for k, v in config.to_dict().items() if v != getattr(CacheConfig(), k)}
    # Infinity is not JSON.
    return {**settings, "max_growth": str(config.max_growth), "surprise": use_surprise, **setting._asdict()}


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
