"""How long the first call takes, which compiles."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

import afcache
from afcache.models.flux1 import inputs as flux1_inputs
from bench.models.random_flux import make_pipeline, make_transformer
from bench.record.clock import seconds_of
from bench.scale.part_costs import make_inputs
from bench.scale.step_costs import STEPS

CONTENDERS = {
    "plain": "diffusers' forward, torch.compile(fullgraph=True)",
    "plain, regional": "diffusers' compile_repeated_blocks(fullgraph=True)",
    "afcache": "compile_pipeline",
    "afcache, blocks": 'compile_pipeline(compile="blocks")',
    "afcache, residual": 'compile_pipeline with policy("residual")',
}


def measure_compilation(blocks: list[tuple[int, int]], contenders: list[str], backend: str) -> Iterator[dict[str, Any]]:
    """Seconds of the first call, in a process of its own, without caches."""
    for double, single in blocks:
        seconds: dict[str, float] = {}
        for contender in contenders:
            arguments = ["first-call", "--contender", contender, "--blocks", str(double), str(single), "--backend", backend]
            result = subprocess.run(
                [sys.executable, "-W", "ignore", "-m", "bench.overhead", *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = result.stdout.strip().splitlines()
            is_measured = result.returncode == 0 and bool(lines)
            if is_measured:
                seconds[contender] = float(lines[-1])
            yield {
                "blocks": double + single,
                "contender": contender,
                "backend": backend,
                "first call (s)": seconds[contender] if is_measured else result.stderr.strip().splitlines()[-1],
                "of the plain model's": seconds[contender] / seconds["plain"] if {contender, "plain"} <= set(seconds) else "-",
            }


def first_call(contender: str, double: int, single: int, backend: str) -> float:
    """Seconds until the first call has returned, at hidden 128 and 64 image tokens."""
    torch.compiler.config.force_disable_caches = True
    transformer = make_transformer(dim=128, double=double, single=single)
    pipe = make_pipeline(transformer)
    if contender == "plain":
        transformer.compile(fullgraph=True, backend=backend)
    elif contender == "plain, regional":
        transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        settings = afcache.policy("residual" if contender.endswith("residual") else "adaptive")
        what = "blocks" if contender.endswith("blocks") else "step"
        afcache.compile_pipeline(pipe, settings, compile=what, backend=backend)
    inputs = make_inputs(64, 128)
    pipe.scheduler.set_timesteps(STEPS)
    arguments = flux1_inputs.host_arguments(inputs._replace(timestep=pipe.scheduler.timesteps[:1] / 1000))
    with torch.no_grad():
        return seconds_of(lambda: transformer(**arguments, return_dict=False))[1]
