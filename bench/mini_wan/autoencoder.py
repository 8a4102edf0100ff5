"""mini-Wan's autoencoder: two passes over a whole clip instead of one for every few frames, and its training.

AutoencoderKLWan encodes four frames at a time and decodes one latent frame at a time, to save memory. Its convolutions are
causal, so the first frame and then all the others give the same result; that is what training can afford.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from bench.mini_flux.muon import Muon
from bench.mini_wan import data
from bench.mini_wan.parts import build_vae


def encode(vae: Any, clips: torch.Tensor) -> DiagonalGaussianDistribution:
    """Posterior of `clips [batch, 3, frames, 32, 32]`, as `vae.encode` gives it."""
    vae.clear_cache()
    pieces = []
    for piece in (clips[:, :, :1], clips[:, :, 1:]):
        if piece.shape[2]:
            pieces.append(vae.encoder(piece, feat_cache=vae._enc_feat_map, feat_idx=[0]))
    vae.clear_cache()
    return DiagonalGaussianDistribution(vae.quant_conv(torch.cat(pieces, dim=2)))


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Clips of `latents [batch, 8, latent frames, 16, 16]`, as `vae.decode` gives them but for its clamp to [-1, 1]."""
    vae.clear_cache()
    hidden = vae.post_quant_conv(latents)
    pieces = [vae.decoder(hidden[:, :, :1], feat_cache=vae._feat_map, feat_idx=[0], first_chunk=True)]
    if hidden.shape[2] > 1:
        pieces.append(vae.decoder(hidden[:, :, 1:], feat_cache=vae._feat_map, feat_idx=[0]))
    vae.clear_cache()
    return torch.cat(pieces, dim=2)


def unit_latents(vae: Any, clips: torch.Tensor) -> torch.Tensor:
    """What the transformer sees: `[batch, 8, latent frames, 16, 16]`, mean 0 and deviation 1 per channel."""
    shape = (1, -1, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean, device=clips.device).view(shape)
    std = torch.tensor(vae.config.latents_std, device=clips.device).view(shape)
    return (encode(vae, clips).mode() - mean) / std


# Frames and clips of successive training steps: short windows are cheaper, whole clips are what counts.
_WINDOWS = ((5, 4), (9, 3), (5, 4), (data.FRAMES, 2))
_LR = 5e-3
# Clips that latents are scaled by, and others that the reconstruction is measured on.
_CHECKED = 64


def _window(clips: data.Clips, step: int, batch: int) -> torch.Tensor:
    frames, count = _WINDOWS[step % len(_WINDOWS)]
    start = step * 5 % (data.FRAMES - frames + 1)
    return clips.draw(count * batch)[0][:, :, start : start + frames]


def _learning_rate(progress: float) -> float:
    """A short way up, then a cosine down to zero; `progress` in [0, 1]."""
    return _LR * min(1.0, progress / 0.03 + 0.01) * 0.5 * (1 + math.cos(math.pi * progress))


def _optimizers(vae: Any) -> list[torch.optim.Optimizer]:
    """Muon for the kernels between the first convolutions and the last, AdamW for the rest."""
    ends = ("encoder.conv_in.", "decoder.conv_in.", "encoder.conv_out.", "decoder.conv_out.", "quant", "post_quant")
    kernels, others = [], []
    for name, param in vae.named_parameters():
        (kernels if name.endswith("weight") and not name.startswith(ends) else others).append(param)
    return [Muon(kernels, lr=_LR), torch.optim.AdamW(others, lr=_LR, weight_decay=1e-4)]


def load_or_train(
    path: Path, *, steps: int, seed: int, minutes: float | None = None, device: str = "cpu", batch: int = 1
) -> Any:
    """Return the autoencoder, frozen: trained once by reconstruction and a light KL term, then kept in `path`.

    Args:
        path: folder of the autoencoder.
        steps: optimiser steps.
        seed: of weights and clips.
        minutes: length of the training, instead of `steps`.
        device: where it is trained.
        batch: each step takes so many times two to four clips; one core of a CPU does a step of 1 in half a second.

    """
    if path.exists():
        stored: Any = AutoencoderKLWan.from_pretrained(path).eval().requires_grad_(False)
        return stored.to(device)
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    optimizers = _optimizers(vae)
    clips = data.Clips(seed + 1, device)
    errors: list[torch.Tensor] = []
    started, progress = time.monotonic(), 0.0
    while progress < 1:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(progress)
        errors.append(_step(vae, optimizers, _window(clips, len(errors), batch)))
        elapsed = time.monotonic() - started
        progress = len(errors) / steps if minutes is None else elapsed / (60 * minutes)
        if len(errors) % 100 == 0 or progress >= 1:
            quality = _decibel(float(torch.stack(errors[-100:]).mean()))
            print(f"autoencoder step {len(errors)} {quality:.1f} dB {elapsed:.0f} s", flush=True)
    vae.eval().requires_grad_(False)
    set_latent_scale(vae, data.Clips(seed + 2, device).draw(_CHECKED)[0])
    print(f"autoencoder: reconstruction {reconstruction_quality(vae, data.Clips(seed + 3, device).draw(_CHECKED)[0]):.1f} dB")
    vae.save_pretrained(path)
    return vae


def _step(vae: Any, optimizers: list[torch.optim.Optimizer], window: torch.Tensor) -> torch.Tensor:
    """Take one optimiser step; return the mean squared error."""
    posterior = encode(vae, window)
    reconstruction = decode(vae, posterior.sample())
    error = F.mse_loss(reconstruction, window)
    kl = posterior.kl().mean() / posterior.mean[0].numel()
    loss = error + 0.1 * F.l1_loss(reconstruction, window) + 1e-4 * kl
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    return error.detach()


def set_latent_scale(vae: Any, clips: torch.Tensor) -> None:
    """Record each latent channel's mean and deviation over `clips`, which the pipeline undoes before it decodes."""
    latents = encode(vae, clips).mode()
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())


def reconstruction_quality(vae: Any, clips: torch.Tensor) -> float:
    """Decibel of whole clips through encoder and decoder."""
    return _decibel(float(F.mse_loss(decode(vae, encode(vae, clips).mode()).clamp(-1, 1), clips)))


def _decibel(mse: float) -> float:
    return -10 * math.log10(mse / 4)
