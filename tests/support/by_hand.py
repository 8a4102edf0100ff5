"""Other caches' rules again, in plain Python around the host's own modules: one sample, float arithmetic, no code of ours."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from afcache.models.flux1.inputs import FluxInputs

TEACACHE = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)


class Host:
    """A transformer at one step, run by its own blocks."""

    def __init__(self, transformer: Any, inputs: FluxInputs, latents: Tensor, sigma: float) -> None:
        self.transformer = transformer
        self.blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.temb = transformer.time_text_embed(torch.full((1,), sigma * 1000), inputs.pooled_projections)
        self.image = transformer.x_embedder(latents)
        self.text = transformer.context_embedder(inputs.encoder_hidden_states)
        self.rotary = transformer.pos_embed(torch.cat((inputs.txt_ids, inputs.img_ids), dim=0))

    def run(self, tokens: tuple[Tensor, Tensor], start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Image and text tokens after some of the blocks."""
        image, text = tokens
        for block in self.blocks[start:stop]:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=self.temb, image_rotary_emb=self.rotary)
        return image, text

    def head(self, image: Tensor) -> Tensor:
        return self.transformer.proj_out(self.transformer.norm_out(image, self.temb))

    def modulated(self) -> Tensor:
        return self.transformer.transformer_blocks[0].norm1(self.image, emb=self.temb)[0]


def change(x: Tensor, reference: Tensor) -> float:
    return float((x - reference).abs().mean() / reference.abs().mean())


# (step, host, what it remembers between steps) -> whether to compute
Rule = Callable[[int, Host, dict[str, Any]], bool]
# (known steps, their residuals, step) -> forecast
Forecast = Callable[[list[int], list[Tensor], int], Tensor]


def reuse(steps: list[int], residuals: list[Tensor], step: int) -> Tensor:
    del steps, step
    return residuals[-1]


def taylor(steps: list[int], residuals: list[Tensor], step: int) -> Tensor:
    if len(steps) < 2:
        return residuals[-1]
    slope = (residuals[-1] - residuals[-2]) / (steps[-1] - steps[-2])
    return residuals[-1] + slope * (step - steps[-1])


def linear_in_sigma(sigmas: Tensor) -> Forecast:
    def forecast(steps: list[int], residuals: list[Tensor], step: int) -> Tensor:
        if len(steps) < 2:
            return residuals[-1]
        last, before, now = (float(sigmas[i]) for i in (steps[-1], steps[-2], step))
        return residuals[-1] + (residuals[-1] - residuals[-2]) / (last - before) * (now - last)

    return forecast


def chebyshev(steps: list[int], residuals: list[Tensor], step: int) -> Tensor:
    design = np.polynomial.chebyshev.chebvander(2 * np.array(steps) / 50 - 1, 4)
    basis = np.polynomial.chebyshev.chebvander(np.array([2 * step / 50 - 1]), 4)
    weights = basis @ np.linalg.solve(design.T @ design + 0.1 * np.eye(5), design.T)
    return sum(float(w) * r for w, r in zip(weights[0], residuals, strict=True))  # pyright: ignore[reportReturnType]


def every(warmup: int, interval: int) -> Rule:
    return lambda step, host, kept: step < warmup or (step - warmup + 1) % interval == 0


def listed(pattern: str) -> Rule:
    return lambda step, host, kept: pattern[step] == "F"


def teacache(threshold: float, last: int) -> Rule:
    def rule(step: int, host: Host, kept: dict[str, Any]) -> bool:
        seen, before = host.modulated(), kept.get("seen")
        kept["seen"] = seen
        if step in (0, last) or before is None:
            kept["sum"] = 0.0
            return True
        kept["sum"] += float(np.polyval(TEACACHE, change(seen, before)))
        if kept["sum"] < threshold:
            return False
        kept["sum"] = 0.0
        return True

    return rule


def first_blocks(count: int, threshold: float, warmup: int) -> Rule:
    def rule(step: int, host: Host, kept: dict[str, Any]) -> bool:
        added = host.run((host.image, host.text), 0, count)[0] - host.image
        if step >= warmup and change(added, kept["added"]) < threshold:
            return False
        kept["added"] = added
        return True

    return rule


@torch.no_grad()
def sample_by_hand(
    transformer: Any, inputs: FluxInputs, sigmas: Tensor, rule: Rule, forecast: Forecast, *, first: int = 0, last: int = 0
) -> tuple[str, Tensor]:
    """Decisions and final latents of one sample."""
    latents, blocks = inputs.hidden_states, 12
    steps: list[int] = []
    residuals: list[Tensor] = []
    kept: dict[str, Any] = {}
    pattern = ""
    for step in range(len(sigmas) - 1):
        host = Host(transformer, inputs, latents, float(sigmas[step]))
        start = host.run((host.image, host.text), 0, first)
        is_computed = rule(step, host, kept)
        if is_computed:
            middle = host.run(start, first, blocks - last)
            steps.append(step)
            residuals.append(torch.cat(middle, dim=1) - torch.cat(start, dim=1))
        else:
            together = torch.cat(start, dim=1) + forecast(steps, residuals, step)
            middle = together[:, : host.image.shape[1]], together[:, host.image.shape[1] :]
        image, _ = host.run(middle, blocks - last, blocks)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * host.head(image)
        pattern += "F" if is_computed else "."
    return pattern, latents
