"""A FLUX of random weights on a device, plain or cached, and what its steps cost there."""

import argparse
import contextlib
import dataclasses
import gc
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor.utils import fresh_cache

import afcache
from afcache import CacheConfig
from afcache.runtime.binding import require_runtime
from afcache.runtime.compiled import CompileOptions
from afcache.settings.config import Target
from afcache.settings.presets import DEFAULT_TARGET, preset_config
from bench.models.random_flux import Size, make_flux1, make_pipeline
from bench.record.clock import CallClock, seconds_of
from bench.scale.step_costs import WARMUP

TEXT_TOKENS = 512
INTERVAL = 4
_CALL = "transformer call"
# What the host waits in; on a CPU, reads of a tensor's value, which would be waits on an accelerator.
_WAITS = {
    "cuda": {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"},
    "cpu": {"aten::_local_scalar_dense"},
}


class Shape(NamedTuple):
    """Of the images.

    Attributes:
        pixels: of a side.
        batch: images of a call.

    """

    pixels: int
    batch: int


def parse_shape(text: str) -> Shape:
    """Read "1024x4": pixels of a side, images of a batch.

    Raises:
        ArgumentTypeError: it is no such pair, or the side is no multiple of 16.

    """
    pixels, _, batch = text.partition("x")
    if not (pixels.isdecimal() and batch.isdecimal() and int(pixels) % 16 == 0 and int(pixels) * int(batch) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no PIXELSxBATCH with a side that 16 divides, such as 1024x4")
    return Shape(int(pixels), int(batch))


class Subject:
    """A pipeline of random weights, and the seconds of its transformer's calls by the device's own clock.

    Args:
        size: of the transformer.
        device: where it lives.
        target: what a cached step forecasts.

    """

    def __init__(self, size: Size, device: str, target: Target = DEFAULT_TARGET) -> None:
        torch.manual_seed(0)
        self.device = device
        # The default preset, but for a limit of gaps that would refuse the forced pattern.
        self.config = dataclasses.replace(preset_config("balanced", target=target), max_growth=float("inf"))
        self.transformer = make_flux1(size, dtype=torch.bfloat16, device=device)
        self.pipe = make_pipeline(self.transformer)
        self._inputs: dict[Shape, afcache.FluxInputs] = {}
        self._clock = CallClock(self.transformer, device, label=_CALL)

    def seconds(self) -> list[float]:
        """Of every call since the last time that this was asked."""
        return self._clock.take()

    def inputs(self, shape: Shape) -> afcache.FluxInputs:
        """Those of one call in the middle of an image, always the same."""
        if shape not in self._inputs:
            # Those of other shapes would count as memory.
            self._inputs = {shape: self._make_inputs(shape)}
        return self._inputs[shape]

    def _make_inputs(self, shape: Shape) -> afcache.FluxInputs:
        generator, config = torch.Generator().manual_seed(0), self.transformer.config
        side = torch.arange(shape.pixels // 16, dtype=torch.float32)
        positions = torch.cartesian_prod(torch.zeros(1), side, side)

        def noise(*sizes: int) -> Tensor:
            return torch.randn(shape.batch, *sizes, generator=generator).to(self.device, torch.bfloat16)

        return afcache.FluxInputs(
            encoder_hidden_states=noise(TEXT_TOKENS, config.joint_attention_dim),
            pooled_projections=noise(config.pooled_projection_dim),
            hidden_states=noise(len(positions), config.in_channels),
            timestep=torch.full((shape.batch,), 0.5, device=self.device, dtype=torch.bfloat16),
            img_ids=positions.to(self.device, torch.bfloat16),
            txt_ids=torch.zeros(TEXT_TOKENS, 3, device=self.device, dtype=torch.bfloat16),
            guidance=torch.full((shape.batch,), 3.5, device=self.device),
        )

    def draw(self, shape: Shape, steps: int) -> Tensor:
        """Latents of one batch, always the same."""
        inputs = self.inputs(shape)
        return self.pipe(
            prompt_embeds=inputs.encoder_hidden_states,
            pooled_prompt_embeds=inputs.pooled_projections,
            latents=inputs.hidden_states,
            height=shape.pixels,
            width=shape.pixels,
            num_inference_steps=steps,
            output_type="latent",
        ).images

    def wait(self) -> None:
        """Let the device finish."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def first_call(self, shape: Shape) -> float:
        """Seconds of one step, compilation included."""
        self.wait()
        _, seconds = seconds_of(lambda: self.draw(shape, 1), self.device)
        self.seconds()
        return seconds

    def peak(self, shape: Shape, steps: int) -> float | None:
        """MiB that an image needs at most, weights included; None without a device that counts them."""
        if self.device != "cuda":
            return None
        self.wait()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        self.draw(shape, steps)
        self.wait()
        self.seconds()
        return torch.cuda.max_memory_allocated() / 2**20

    def waits(self, shape: Shape, steps: int) -> list[int]:
        """How often the host waits for the device from the start of each call to that of the next."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.wait()
        with torch.profiler.profile(activities=kinds) as profile:
            self.draw(shape, steps)
        self.seconds()
        events: Any = profile.events()
        starts = sorted(event.time_range.start for event in events if event.name == _CALL and event.device_type.name == "CPU")
        ends = [*starts[1:], max(e.time_range.end for e in events if e.name == _CALL and e.device_type.name == "CPU")]
        found = [event.time_range.start for event in events if event.name in _WAITS[self.device]]
        return [sum(start <= moment < end for moment in found) for start, end in zip(starts, ends, strict=True)]


@contextlib.contextmanager
def plain(subject: Subject, backend: str) -> Iterator[None]:
    """The forward of diffusers, compiled whole with the settings that ours has; compiled anew."""
    how = CompileOptions(backend=backend).tuning()
    torch._dynamo.reset()
    with fresh_cache():
        subject.transformer.forward = torch.compile(subject.transformer.forward, fullgraph=True, backend=backend, **how)
        try:
            yield
        finally:
            del subject.transformer.forward


@contextlib.contextmanager
def regional(subject: Subject, backend: str) -> Iterator[None]:
    """The forward of diffusers, compiled block by block."""
    torch._dynamo.reset()
    with fresh_cache():
        subject.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
        try:
            yield
        finally:
            for module in subject.transformer.modules():
                module._compiled_call_impl = None


@contextlib.contextmanager
def cached(subject: Subject, backend: str, **options: Any) -> Iterator[None]:
    """AFCache; its decisions can be forced and let go without another compilation."""
    torch._dynamo.reset()
    with fresh_cache():
        afcache.compile_pipeline(subject.pipe, subject.config, backend=backend, **options)
        try:
            yield
        finally:
            afcache.restore_pipeline(subject.pipe)


def force(subject: Subject, steps: int) -> None:
    """From now on a refresh every fourth step: plan and tolerance are inputs of the graph, which stays what it is."""
    plan = tuple(range(WARMUP - 1, steps, INTERVAL))
    runtime = require_runtime(subject.pipe)
    runtime.config = dataclasses.replace(subject.config, policy="planned", refresh_steps=plan, tolerance=1e9)


def decide(subject: Subject, config: CacheConfig | None = None) -> None:
    """From now on decisions are made by error control; None: that of the subject."""
    require_runtime(subject.pipe).config = config or subject.config
