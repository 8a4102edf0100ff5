"""What the ranks of a parallel run draw, and what one process draws to compare with."""

from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel

import afcache
from afcache import CacheConfig, ParallelConfig

ADAPTIVE = CacheConfig(tolerance=0.02, warmup_steps=2)
DBCACHE = afcache.policy("dbcache", first_blocks=1, last_blocks=1, threshold=0.5)
LAYERWISE = afcache.policy("layerwise", groups=4)


class Case(NamedTuple):
    """One image.

    Attributes:
        text: text tokens.
        height, width: pixels; four to a token.
        cfg: true CFG scale.
        config: settings.
        steps: of the schedule.
        backend: of torch.compile; None: eager.

    """

    text: int = 8
    height: int = 32
    width: int = 32
    cfg: float = 1.0
    config: CacheConfig = ADAPTIVE
    steps: int = 28
    backend: str | None = "aot_eager"


class Drawn(NamedTuple):
    """An image, and how it came about.

    Attributes:
        latents: at the end.
        decisions: what every call refreshed.
        choices: what groups did at every call, where there are some.
        graphs: graphs that Dynamo made.
        breaks: graph breaks.

    """

    latents: torch.Tensor
    decisions: list[tuple[bool, ...]]
    choices: list[tuple[str, ...]]
    graphs: int
    breaks: int


CASES = {
    "divisible": Case(),
    "short text": Case(text=5),
    "long text, odd image": Case(text=77, height=28, width=28),
    "odd everything": Case(text=5, height=20, width=28),
    "guided": Case(text=5, height=28, width=28, cfg=2.0),
    "layerwise": Case(config=LAYERWISE),
    "layerwise, guided": Case(config=LAYERWISE, cfg=2.0),
    "teacache": Case(text=5, height=28, width=28, config=afcache.policy("teacache", threshold=0.6)),
    "first and last blocks": Case(text=5, height=28, width=28, config=DBCACHE),
    "uncached": Case(text=5, height=28, width=28, config=afcache.policy("none"), steps=6),
    "inductor": Case(text=5, height=28, width=28, backend="inductor"),
    "eager": Case(text=5, height=28, width=28, backend=None),
}


def make_pipeline() -> Any:
    """Mini-FLUX with a transformer of four heads, whose weights are mini-FLUX's where they fit and random elsewhere."""
    pipe = afcache.load_mini_flux()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    return pipe


def draw(pipe: Any, case: Case, parallel: ParallelConfig | None = None, *, seed: int = 0, prompt: str = "a two") -> Drawn:
    """Draw a case, alone or together with other ranks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: dict[str, Any] = {"backend": case.backend} if case.backend else {"compile": False}
    afcache.compile_pipeline(pipe, case.config, parallel=parallel, **compiled)
    guided: dict[str, Any] = {"true_cfg_scale": case.cfg, "negative_prompt": ""} if case.cfg > 1 else {}
    latents = pipe(
        prompt,
        height=case.height,
        width=case.width,
        max_sequence_length=case.text,
        num_inference_steps=case.steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        **guided,
    ).images
    report = afcache.report(pipe)
    counters = torch._dynamo.utils.counters
    return Drawn(
        latents,
        [step.refreshed for step in report.steps],
        [tuple(group.choice[0] for group in step.groups) for step in report.steps],
        counters["stats"]["unique_graphs"],
        sum(counters["graph_break"].values()),
    )
