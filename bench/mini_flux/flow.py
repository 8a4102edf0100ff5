"""Rectified-flow training of a recipe's transformer."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor

from afcache._typing import HostModule
from bench.mini_flux.descent import descend, slow_timesteps
from bench.mini_flux.muon import Muon
from bench.mini_flux.parts import build_transformer
from bench.mini_flux.recipe import Recipe, Source
from bench.mini_flux.vae import encode_images

_CHUNK = 1000


class LatentSource(Protocol):
    """Random training latents of unit variance; `generator` is all that the next batch depends on."""

    generator: torch.Generator

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return `(latents [count, 8, height, width], classes [count])`."""
        ...


class Fresh:
    """Renders and encodes new images for each batch."""

    def __init__(self, source: Source, vae: HostModule, *, seed: int) -> None:
        self._source, self._vae = source, vae
        self.generator = torch.Generator(source.device).manual_seed(seed)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return new images' latents and classes."""
        images, classes = self._source.draw(count, self.generator)
        return encode_images(self._vae, images.to(self._vae.device)), classes.to(self._vae.device)


class Pool:
    """Latents of `size` images, rendered and encoded once and kept on the device."""

    def __init__(self, recipe: Recipe, vae: HostModule, size: int, *, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        source = recipe.source(device)
        renderer = torch.Generator(source.device).manual_seed(seed)
        latents, classes = [], []
        for start in range(0, size, _CHUNK):
            images, of_chunk = source.draw(min(_CHUNK, size - start), renderer)
            latents.append(encode_images(vae, images.to(device)))
            classes.append(of_chunk.to(device))
        self._latents, self._classes = torch.cat(latents), torch.cat(classes)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Return random latents of the pool and their classes."""
        rows = torch.randint(0, len(self._classes), (count,), generator=self.generator, device=self._classes.device)
        return self._latents[rows], self._classes[rows]


class FlowTrainer:
    """Rectified-flow training with an exponential moving average of the weights; its whole state can be saved.

    Args:
        recipe: whose transformer is trained.
        latents: where batches come from.
        embeddings: the empty prompt's (row 0) and every wording's, class by class: `[1 + classes * wordings, ...]`.
        steps: of the whole cosine schedule; may be set anew on the way.
        lr: highest learning rate.
        batch: samples of a step.
        seed: of the weights; noise and wordings have one made of it.
        device: of everything; a step there never waits for the CPU.

    """

    def __init__(
        self,
        recipe: Recipe,
        latents: LatentSource,
        embeddings: tuple[Tensor, Tensor],
        *,
        steps: int,
        lr: float,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        torch.manual_seed(seed)
        self.latents, self.steps, self.batch = latents, steps, batch
        self.embeddings = embeddings[0].to(device), embeddings[1].to(device)
        self._per_class = (len(embeddings[0]) - 1) // len(recipe.classes)
        self.transformer = build_transformer(recipe).to(device)
        _init_adaln_zero(self.transformer)
        self.average = build_transformer(recipe).to(device).requires_grad_(False)
        self.average.load_state_dict(self.transformer.state_dict())
        named = list(self.transformer.named_parameters())
        is_matrix = [param.ndim == 2 and "blocks" in name and "norm" not in name for name, param in named]
        matrices = [param for (_, param), matrix in zip(named, is_matrix, strict=True) if matrix]
        others = [param for (_, param), matrix in zip(named, is_matrix, strict=True) if not matrix]
        self.optimizers = [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True)]
        self.base_lr = lr
        self.mask = _timestep_mask(self.transformer)
        self._text_ids = torch.zeros(embeddings[0].shape[1], 3, device=device)
        self._image_ids: Tensor | None = None
        self.generator = torch.Generator(device).manual_seed(seed + 4)
        self.step_index = 0

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "step_index": self.step_index,
            "transformer": self.transformer.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generators": [self.latents.generator.get_state(), self.generator.get_state()],
        }

    def restore(self, state: dict) -> None:
        """Continue from what `state` returned."""
        self.step_index = state["step_index"]
        self.transformer.load_state_dict(state["transformer"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.latents.generator.set_state(state["generators"][0])
        self.generator.set_state(state["generators"][1])

    def learning_rate(self) -> float:
        """100 steps up, then a cosine down to zero."""
        warm = min(1.0, (self.step_index + 1) / 100)
        return self.base_lr * warm * 0.5 * (1 + math.cos(math.pi * self.step_index / self.steps))

    def step(self) -> Tensor:
        """Take one optimiser step; return the loss, on the device."""
        latents, classes = self.latents.draw(self.batch)
        if self._image_ids is None:
            self._image_ids = _latent_ids(latents)
        packed = FluxPipeline._pack_latents(latents, *latents.shape)
        prompt_embeds, pooled = self._draw_prompts(classes)
        noise, sigma = self._draw_noise(packed)
        noised = (1 - sigma[:, None, None]) * packed + sigma[:, None, None] * noise
        velocity = self.transformer(
            hidden_states=noised,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=self._image_ids,
            txt_ids=self._text_ids,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - packed)
        descend(loss, self.transformer, self.optimizers, self.learning_rate())
        self._mask_and_average()
        self.step_index += 1
        return loss.detach()

    def _draw_noise(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Noise like the latents, and noise levels `[batch]`: logit-normal, one in seven uniform."""
        options = {"generator": self.generator, "device": packed.device}
        noise = torch.randn(packed.shape, **options)
        logit_normal = torch.sigmoid(torch.randn(len(packed), **options))
        uniform = torch.rand(len(packed), **options)
        is_uniform = torch.rand(len(packed), **options) < 0.15
        return noise, torch.where(is_uniform, uniform, logit_normal)

    def _draw_prompts(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Pick a wording for each image; one in ten becomes the empty prompt, which true CFG needs."""
        options = {"generator": self.generator, "device": classes.device}
        wording = torch.randint(0, self._per_class, classes.shape, **options)
        rows = 1 + classes * self._per_class + wording
        rows = torch.where(torch.rand(classes.shape, **options) < 0.1, torch.zeros_like(rows), rows)
        return self.embeddings[0][rows], self.embeddings[1][rows]

    @torch.no_grad()
    def _mask_and_average(self) -> None:
        self.transformer.time_text_embed.timestep_embedder.linear_1.weight.mul_(self.mask)
        decay = min(0.999, (1 + self.step_index) / (10 + self.step_index))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.transformer.parameters()), 1 - decay)


def _latent_ids(latents: Tensor) -> Tensor:
    _, _, height, width = latents.shape
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, latents.device, latents.dtype)


def _timestep_mask(transformer: HostModule) -> Tensor:
    return slow_timesteps(transformer.time_text_embed.time_proj.num_channels).to(transformer.device)


@torch.no_grad()
def _init_adaln_zero(transformer: HostModule) -> None:
    """Start every modulation and the head at zero, as diffusion transformers are trained."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    names = ("norm", "norm1", "norm1_context")
    modulations = [getattr(block, name).linear for block in blocks for name in names if hasattr(block, name)]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        linear.weight.zero_()
        linear.bias.zero_()
    transformer.time_text_embed.timestep_embedder.linear_1.weight.mul_(_timestep_mask(transformer))
