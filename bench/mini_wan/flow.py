"""The flow stage of mini-Wan's training: a pool of latents on the device, and rectified flow on it."""

import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.mini_flux.descent import descend, slow_timesteps
from bench.mini_flux.muon import Muon
from bench.mini_wan import autoencoder, data
from bench.mini_wan.parts import build_transformer

_CLIP_SEED, _NOISE_SEED = 3, 4
# Steps before some are timed, and those.
_WARM, _TIMED = 20, 50


class Pool:
    """Latents `[size, 8, 9, 16, 16]` of random clips and their classes `[size, 3]`, renewed chunk by chunk.

    Attributes:
        seconds: what a chunk takes.

    """

    def __init__(self, vae: Any, *, size: int, chunk: int, seed: int, device: str) -> None:
        self.vae, self.chunk = vae, chunk
        self.clips = data.Clips(seed, device)
        first = self._chunk()
        float(first[0].sum())
        started = time.monotonic()
        pieces = [first, *(self._chunk() for _ in range(max(1, size // chunk - 1)))]
        self.latents = torch.cat([latents for latents, _ in pieces])
        self.classes = torch.cat([classes for _, classes in pieces])
        float(self.latents.sum())
        self.seconds = (time.monotonic() - started) / (len(pieces) - 1)
        self._next = 0

    @torch.no_grad()
    def _chunk(self) -> tuple[Tensor, Tensor]:
        clips, classes = self.clips.draw(self.chunk)
        return autoencoder.unit_latents(self.vae, clips), classes

    def renew(self) -> None:
        """Replace the oldest chunk."""
        rows = slice(self._next, self._next + self.chunk)
        self.latents[rows], self.classes[rows] = self._chunk()
        self._next = (self._next + self.chunk) % len(self.latents)


class FlowTrainer:
    """Rectified-flow training with an exponential moving average of the weights; its whole state can be saved.

    The pool is no part of the state: after a restart it holds other clips.

    Attributes:
        noise_levels: between which it learns.
        steps: where the cosine schedule ends; None while it is not known yet.
        renew_every: steps between two renewals of a chunk of the pool; None while it is not known yet.
        step_index: steps taken.

    """

    def __init__(
        self,
        pool: Pool,
        embeddings: Tensor,
        *,
        steps: int | None,
        lr: float,
        batch: int,
        renew_every: int | None,
        device: str = "cpu",
        low_precision: bool = False,
        noise_levels: tuple[float, float] = (0.0, 1.0),
        start: dict[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.noise_levels = noise_levels
        self.pool, self.embeddings, self.steps = pool, embeddings.to(device), steps
        self.batch, self.renew_every, self.base_lr = batch, renew_every, lr
        self.device, self.low_precision = device, low_precision
        transformer = build_transformer()
        self.mask = _timestep_mask(transformer).to(device)
        _init_adaln_zero(transformer)
        if start is not None:
            transformer.load_state_dict(start)
        self.transformer: Any = transformer.to(device)
        self.average = build_transformer().requires_grad_(False).to(device)
        self.average.load_state_dict(self.transformer.state_dict())
        if low_precision:
            _keep_precise(self.transformer, device)
        self.optimizers = _optimizers(self.transformer, lr)
        self.generator = torch.Generator(device).manual_seed(seed + _NOISE_SEED)
        self.step_index = 0
        self._mask_and_average()

    def state(self) -> dict:
        """Everything that the next step depends on, but for the pool."""
        return {
            "step_index": self.step_index,
            "steps": self.steps,
            "transformer": self.transformer.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def restore(self, state: dict) -> None:
        """Continue from what `state` returned, on any device; the noise goes on only where the device is of the same kind."""
        self.step_index, self.steps = state["step_index"], state["steps"]
        self.transformer.load_state_dict(state["transformer"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if len(state["generator"]) == len(self.generator.get_state()):
            self.generator.set_state(state["generator"])
        self.pool.clips.generator.manual_seed(_CLIP_SEED + self.step_index)

    def learning_rate(self) -> float:
        """100 steps up, then a cosine down to zero."""
        warm = min(1.0, (self.step_index + 1) / 100)
        progress = self.step_index / self.steps if self.steps else 0.0
        return self.base_lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def step(self) -> Tensor:
        """Take one optimiser step; return the loss, without waiting for the device."""
        latents, prompt_embeds = self._draw()
        noise = torch.randn(latents.shape, generator=self.generator, device=self.device)
        sigma = self._draw_sigma()
        weight = sigma[:, None, None, None, None]
        with torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.low_precision):
            velocity = self.transformer(
                hidden_states=(1 - weight) * latents + weight * noise,
                timestep=sigma * 1000,
                encoder_hidden_states=prompt_embeds,
                return_dict=False,
            )[0]
        loss = F.mse_loss(velocity.float(), noise - latents)
        descend(loss, self.transformer, self.optimizers, self.learning_rate())
        self._mask_and_average()
        self.step_index += 1
        if self.renew_every and self.step_index % self.renew_every == 0:
            self.pool.renew()
        return loss.detach()

    def _rand(self) -> Tensor:
        return torch.rand(self.batch, generator=self.generator, device=self.device)

    def _draw(self) -> tuple[Tensor, Tensor]:
        """Pick clips, and a wording for each; one in ten becomes the empty prompt, which CFG needs."""
        rows = (self._rand() * len(self.pool.latents)).long()
        digits, ways, places = self.pool.classes[rows].unbind(1)
        per_class = (len(self.embeddings) - 1) // data.CLASSES
        prompts = 1 + ((digits * 4 + ways) * 2 + places) * per_class + (self._rand() * per_class).long()
        prompts = torch.where(self._rand() < 0.1, torch.zeros_like(prompts), prompts)
        return self.pool.latents[rows], self.embeddings[prompts]

    def _draw_sigma(self) -> Tensor:
        logit_normal = torch.sigmoid(torch.randn(self.batch, generator=self.generator, device=self.device))
        least, most = self.noise_levels
        return least + (most - least) * torch.where(self._rand() < 0.15, self._rand(), logit_normal)

    @torch.no_grad()
    def _mask_and_average(self) -> None:
        self.transformer.condition_embedder.time_embedder.linear_1.weight.mul_(self.mask)
        decay = min(0.999, (1 + self.step_index) / (10 + self.step_index))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.transformer.parameters()), 1 - decay)


def train(trainer: FlowTrainer, *, deadline: float | None, save: Any) -> None:
    """Take all steps; what the trainer does not know yet is decided when some steps have been timed.

    Args:
        trainer: may have been restored.
        deadline: `time.monotonic()` at which to be done, where the trainer has no number of steps.
        save: called every 1000 steps and at the end.

    """
    begun, losses = trainer.step_index, []
    mark = started = time.monotonic()
    while trainer.steps is None or trainer.step_index < trainer.steps:
        losses.append(trainer.step())
        index = trainer.step_index
        if index == begun + _WARM:
            float(losses[-1])
            mark = time.monotonic()
        if index == begun + _WARM + _TIMED:
            float(losses[-1])
            _plan(trainer, (time.monotonic() - mark) / _TIMED, deadline)
        if index % 100 == 0:
            mean = float(torch.stack(losses[-100:]).mean())
            if not math.isfinite(mean):
                raise RuntimeError(f"the loss is {mean} after step {index}")
            elapsed = time.monotonic() - started
            pace = 1000 * elapsed / (index - begun)
            print(f"step {index} loss {mean:.4f}, {elapsed:.0f} s, {pace:.1f} ms a step", flush=True)
        if index % 1000 == 0 or index == trainer.steps:
            save()


def _plan(trainer: FlowTrainer, seconds: float, deadline: float | None) -> None:
    """Spend a tenth of the time on fresh clips, and let the schedule end in time, by the seconds of a step."""
    if trainer.renew_every is None:
        trainer.renew_every = math.ceil(10 * trainer.pool.seconds / seconds)
        seconds += trainer.pool.seconds / trainer.renew_every
    if trainer.steps is None and deadline is not None:
        trainer.steps = trainer.step_index + max(1, int((deadline - time.monotonic()) / seconds))
    renewal = f"a chunk of {trainer.pool.chunk} clips {1000 * trainer.pool.seconds:.1f} ms, renewed every {trainer.renew_every}"
    print(f"a step takes {1000 * seconds:.1f} ms, {renewal}; the schedule ends after {trainer.steps} steps", flush=True)


def _timestep_mask(transformer: Any) -> Tensor:
    return slow_timesteps(transformer.condition_embedder.timesteps_proj.num_channels)


@torch.no_grad()
def _init_adaln_zero(transformer: Any) -> None:
    """Start every modulation, the ungated cross-attention and the head at zero, as diffusion transformers are trained."""
    outputs = [block.attn2.to_out[0] for block in transformer.blocks]
    for linear in [*outputs, transformer.condition_embedder.time_proj, transformer.proj_out]:
        linear.weight.zero_()
        linear.bias.zero_()
    for module in [*transformer.blocks, transformer]:
        module.scale_shift_table.zero_()


def _keep_precise(transformer: Any, device: str) -> None:
    """Under autocast, keep the residual stream and the conditioning in float32."""
    transformer.patch_embedding.register_forward_hook(lambda module, args, output: output.float())
    embedder = transformer.condition_embedder
    embedder.forward = torch.autocast(torch.device(device).type, enabled=False)(embedder.forward)


def _optimizers(transformer: Any, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices, others = [], []
    for name, param in transformer.named_parameters():
        is_matrix = param.ndim == 2 and name.startswith("blocks.")
        (matrices if is_matrix else others).append(param)
    return [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True)]
