"""Train mini-FLUX and write it as a plain FluxPipeline folder.

    python -m bench.mini_flux.train --steps 4000 --output afcache/assets/mini_flux

Three stages, each kept in --work and skipped when it is there already: text encoders, autoencoder, flow transformer. The
last one is resumable: it saves its whole state every few hundred steps.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor
from tqdm import tqdm

from afcache._typing import HostModule
from bench.mini_flux import data, text
from bench.mini_flux.muon import Muon
from bench.mini_flux.parts import build_scheduler, build_transformer, build_vae

SEED = 0
# Sinusoids of the timestep embedding faster than this (radians per unit of 1000 sigma) never decay in a short training
# and make the features jitter from step to step; held-out loss is the same without them.
_TIMESTEP_CUT = 0.02


class Batches:
    """Endless random training batches, one fixed seed."""

    def __init__(self, batch_size: int, seed: int) -> None:
        self.digits = data.load_split()
        self.photographs = data.load_photographs()
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return `(images [batch, 3, 32, 32], digit labels [batch], places [batch])`."""
        picks = torch.randint(0, len(self.digits.train_labels), (self.batch_size,), generator=self.generator)
        places = torch.randint(0, 2, (self.batch_size,), generator=self.generator)
        images = data.render(self.digits.train_images[picks], places, self.photographs, self.generator)
        return images, self.digits.train_labels[picks], places


def train_vae(path: Path, *, steps: int) -> HostModule:
    """Train the autoencoder by reconstruction with a light KL term, then set its scaling to unit latents."""
    if path.exists():
        return AutoencoderKL.from_pretrained(path).eval().requires_grad_(False)
    torch.manual_seed(SEED)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    batches = Batches(32, SEED + 1)
    for _ in tqdm(range(steps), desc="autoencoder", mininterval=10):
        images, _, _ = batches.draw()
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        error = F.mse_loss(reconstruction, images) + 0.1 * F.l1_loss(reconstruction, images)
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae.eval().requires_grad_(False)
    images, _, _ = Batches(256, SEED + 2).draw()
    latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    mse = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), images) / 4
    print(f"autoencoder: reconstruction {-10 * math.log10(float(mse)):.1f} dB, {vae.config.scaling_factor=:.3f}")
    vae.save_pretrained(path)
    return vae


def _latent_ids(batch_latents: torch.Tensor) -> torch.Tensor:
    _, _, height, width = batch_latents.shape
    device, dtype = batch_latents.device, batch_latents.dtype
    return FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, dtype)


def _timestep_mask(transformer: HostModule) -> torch.Tensor:
    half = transformer.time_text_embed.time_proj.num_channels // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half) / half)
    return (frequency <= _TIMESTEP_CUT).float().repeat(2)


class FlowTrainer:
    """Rectified-flow training with an exponential moving average of the weights; its whole state can be saved."""

    def __init__(self, vae: HostModule, embeddings: tuple[torch.Tensor, torch.Tensor], *, steps: int, lr: float):
        torch.manual_seed(SEED)
        self.vae, self.embeddings, self.steps = vae, embeddings, steps
        self.transformer = build_transformer()
        _init_adaln_zero(self.transformer)
        self.average = build_transformer().requires_grad_(False)
        self.average.load_state_dict(self.transformer.state_dict())
        named = list(self.transformer.named_parameters())
        is_matrix = [param.ndim == 2 and "blocks" in name and "norm" not in name for name, param in named]
        matrices = [param for (_, param), matrix in zip(named, is_matrix, strict=True) if matrix]
        others = [param for (_, param), matrix in zip(named, is_matrix, strict=True) if not matrix]
        self.optimizers = [Muon(matrices, lr=lr), torch.optim.AdamW(others, lr=lr, weight_decay=0.0, fused=True)]
        self.base_lr = lr
        self.mask = _timestep_mask(self.transformer)
        self.batches = Batches(32, SEED + 3)
        self.generator = torch.Generator().manual_seed(SEED + 4)
        self.step_index = 0

    def state(self) -> dict:
        """Everything that the next step depends on."""
        return {
            "step_index": self.step_index,
            "transformer": self.transformer.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generators": [self.batches.generator.get_state(), self.generator.get_state()],
        }

    def restore(self, state: dict) -> None:
        """Continue from what `state` returned."""
        self.step_index = state["step_index"]
        self.transformer.load_state_dict(state["transformer"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.batches.generator.set_state(state["generators"][0])
        self.generator.set_state(state["generators"][1])

    def learning_rate(self) -> float:
        """100 steps up, then a cosine down to zero."""
        warm = min(1.0, (self.step_index + 1) / 100)
        return self.base_lr * warm * 0.5 * (1 + math.cos(math.pi * self.step_index / self.steps))

    def step(self) -> float:
        """Take one optimiser step; return the loss."""
        images, labels, places = self.batches.draw()
        batch = len(labels)
        with torch.no_grad():
            latents = self.vae.encode(images).latent_dist.mode()
            latents = (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        image_ids = _latent_ids(latents)
        packed = FluxPipeline._pack_latents(latents, batch, *latents.shape[1:])
        prompt_embeds, pooled = self._draw_prompts(labels, places)
        noise = torch.randn(packed.shape, generator=self.generator)
        logit_normal = torch.sigmoid(torch.randn(batch, generator=self.generator))
        uniform = torch.rand(batch, generator=self.generator)
        is_uniform = torch.rand(batch, generator=self.generator) < 0.15
        sigma = torch.where(is_uniform, uniform, logit_normal)
        noised = (1 - sigma[:, None, None]) * packed + sigma[:, None, None] * noise
        velocity = self.transformer(
            hidden_states=noised,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3),
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - packed)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self._mask_and_average()
        self.step_index += 1
        return float(loss.detach())

    def _draw_prompts(self, labels: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pick a wording for each image; one in ten becomes the empty prompt, which true CFG needs."""
        per_class = (self.embeddings[0].shape[0] - 1) // 20
        wording = torch.randint(0, per_class, labels.shape, generator=self.generator)
        rows = 1 + (labels * 2 + places) * per_class + wording
        rows = torch.where(torch.rand(labels.shape, generator=self.generator) < 0.1, torch.zeros_like(rows), rows)
        return self.embeddings[0][rows], self.embeddings[1][rows]

    @torch.no_grad()
    def _mask_and_average(self) -> None:
        self.transformer.time_text_embed.timestep_embedder.linear_1.weight.mul_(self.mask)
        decay = min(0.999, (1 + self.step_index) / (10 + self.step_index))
        averages: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.transformer.parameters()), 1 - decay)


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


def embed_prompts(encoders: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode the empty prompt (row 0) and every wording, class by class."""
    prompts = [""] + [p for digit in range(10) for place in range(2) for p in data.prompts_for(digit, place)]
    with torch.no_grad():
        return text.encode(prompts, *encoders)


def export(output: Path, encoders: tuple, vae: HostModule, transformer: HostModule) -> None:
    """Write diffusers' folder layout: text encoders in float32, the rest in float16, and the recommended settings.

    transformers loads the dtype that is stored and diffusers float32, so a plain `from_pretrained` is float32 throughout.
    """
    clip_tokenizer, clip, t5_tokenizer, t5 = encoders
    pipe = FluxPipeline(
        scheduler=build_scheduler(),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    pipe.save_pretrained(output)
    for name, cls in (("vae", AutoencoderKL), ("transformer", FluxTransformer2DModel)):
        cls.from_pretrained(output / name, dtype=torch.float16).save_pretrained(output / name)
        config = output / name / "config.json"
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)
        config.write_text(json.dumps(settings, indent=2) + "\n")
    size = data.IMAGE_SIZE
    recommended = {"height": size, "width": size, "max_sequence_length": text.TEXT_LENGTH, "true_cfg_scale": 2.0}
    (output / "recommended.json").write_text(json.dumps(recommended, indent=2) + "\n")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="flow steps of batch 32")
    parser.add_argument("--vae-steps", type=int, default=3000)
    parser.add_argument("--text-steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("bench/mini_flux/runs"))
    parser.add_argument("--output", type=Path, default=Path("afcache/assets/mini_flux"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    started = time.process_time()
    encoders = text.load_or_train_encoders(args.work / "text", steps=args.text_steps, seed=SEED)
    vae = train_vae(args.work / "vae", steps=args.vae_steps)
    trainer = FlowTrainer(vae, embed_prompts(encoders), steps=args.steps, lr=args.lr)
    checkpoint = args.work / "flow.pt"
    if checkpoint.exists():
        trainer.restore(torch.load(checkpoint, weights_only=True))
    losses: list[float] = []
    while trainer.step_index < args.steps:
        losses.append(trainer.step())
        if trainer.step_index % 100 == 0:
            mean = sum(losses[-100:]) / len(losses[-100:])
            print(f"step {trainer.step_index} loss {mean:.4f} cpu {time.process_time() - started:.0f} s", flush=True)
        if trainer.step_index % 500 == 0 or trainer.step_index == args.steps:
            torch.save(trainer.state(), checkpoint)
    export(args.output, encoders, vae, trainer.average)


if __name__ == "__main__":
    main()
