"""Latents that a callback moves off their trajectory: what a forecast bears, and from where on the step is computed anew.

    python -m bench.jumps

After step 10 of 28 the latents of mini-FLUX are moved by so many lengths of the last step, in a random direction, or
replaced by other noise of their level. The reference is the uncached pipeline whose latents are moved alike.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import afcache
from bench.mini_flux import sampling
from bench.record.recording import write_result
from bench.record.render import table

_STEPS, _AT = 28, 10
# In lengths of the last step; None puts other latents in.
_JUMPS = (0.0, 0.5, 1.0, 1.9, 2.1, 4.0, 8.0, None)


def jump(lengths: float | None, seed: int) -> Callable[..., dict[str, Any]]:
    """A callback that moves the latents once.

    Args:
        lengths: how far, relative to the norm of the last step; None replaces them.
        seed: of the direction.

    """
    before: list[Tensor] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del timestep
        latents = tensors["latents"]
        before.append(latents)
        if step != _AT or lengths == 0:
            return {}
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
        if lengths is None:
            return {"latents": noise * pipe.scheduler.sigmas[step + 1].to(latents)}
        length, size = (each.flatten(1).norm(dim=1).view(-1, 1, 1) for each in (latents - before[-2], noise))
        return {"latents": latents + lengths * length / size * noise}

    return callback


def measure(pipe: Any, lengths: float | None, seeds: range, *, cfg: float) -> dict[str, Any]:
    """One row: a jump at one guidance scale."""

    def draw(seed: int) -> Any:
        return sampling.draw(pipe, seed, steps=_STEPS, cfg=cfg, callback=jump(lengths, seed))

    quality, speed, restarted = [], [], 0
    for seed in seeds:
        reference = draw(seed)
        afcache.compile_pipeline(pipe, compile=False)
        quality.append(min(afcache.psnr(draw(seed), reference), 150.0))
        report = afcache.report(pipe)
        afcache.restore_pipeline(pipe)
        speed.append(report.block_speedup)
        restarted += bool(report.restarts)
    return {
        "true CFG": cfg,
        "moved by (lengths of the step)": "other latents" if lengths is None else f"{lengths:g}",
        "started again": f"{restarted} of {len(seeds)}",
        "PSNR mean (dB)": statistics.mean(quality),
        "PSNR worst (dB)": min(quality),
        "PSNR spread (dB, s.d.)": statistics.stdev(quality),
        "fewer block evaluations": statistics.harmonic_mean(speed),
    }


def main() -> None:
    """Measure and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32)
    parser.add_argument("--first-seed", type=int, default=12000)
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0])
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    pipe = sampling.load()
    rows = [measure(pipe, lengths, seeds, cfg=cfg) for cfg in arguments.cfg for lengths in _JUMPS]
    print(table(rows))
    notes = [
        f"Seeds {seeds.start} to {seeds.stop - 1}, {_STEPS} steps, the default preset, eager; PSNR in float64 against the "
        f"uncached image whose latents were moved alike after step {_AT}. With guidance a step's length is that of the longer "
        "branch.",
    ]
    print(write_result("jumps", "Latents that are moved off their trajectory", rows, notes=notes))


if __name__ == "__main__":
    main()
