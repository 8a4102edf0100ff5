"""Training a recipe's autoencoder."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm import tqdm

from afcache._typing import HostModule
from bench.mini_flux.parts import build_vae
from bench.mini_flux.recipe import Recipe


def load_or_train_vae(
    recipe: Recipe, path: Path, *, steps: int, batch: int, seed: int, device: torch.device | str = "cpu"
) -> HostModule:
    """Train by reconstruction with a light KL term, set the scaling to unit latents, and keep it in `path`."""
    if path.exists():
        known: HostModule = AutoencoderKL.from_pretrained(path)
        return known.eval().requires_grad_(False).to(device)
    torch.manual_seed(seed)
    vae = build_vae(recipe).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    source = recipe.source(device)
    generator = torch.Generator(source.device).manual_seed(seed + 1)
    for _ in tqdm(range(steps), desc="autoencoder", mininterval=10):
        images = source.draw(batch, generator)[0].to(device)
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
    images = source.draw(256, torch.Generator(source.device).manual_seed(seed + 2))[0].to(device)
    latents = vae.encode(images).latent_dist.mode()
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    mse = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), images) / 4
    print(f"autoencoder: reconstruction {-10 * math.log10(float(mse)):.1f} dB, {vae.config.scaling_factor=:.3f}", flush=True)
    vae.save_pretrained(path)
    return vae


@torch.no_grad()
def encode_images(vae: HostModule, images: torch.Tensor) -> torch.Tensor:
    """Images `[batch, 3, size, size]` to latents `[batch, 8, size / 2, size / 2]` of mean 0 and variance 1."""
    latents = vae.encode(images).latent_dist.mode()
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor
