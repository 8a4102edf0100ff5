"""What FLUX.1's transformer is called with, as a value."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from afcache._typing import Features, HostModule, ImagePrompts, Level, Velocity, typed
from afcache.functional.model import Lengths


class FluxInputs(NamedTuple):
    """What diffusers hands to `FluxTransformer2DModel.forward`, without options.

    Attributes:
        hidden_states: packed latents `[batch, img_seq, channels]`; pipelines append the channels of `condition` themselves.
        encoder_hidden_states: T5 embeddings `[batch, txt_seq, joint_attention_dim]`.
        pooled_projections: pooled CLIP embeddings `[batch, pooled_projection_dim]`.
        timestep: `[batch]`, in [0, 1].
        img_ids: image positions `[img_seq, 3]`.
        txt_ids: text positions `[txt_seq, 3]`.
        guidance: distilled guidance scale `[batch]`, or None for models without guidance embedding.
        controlnet_block_samples: a ControlNet's residuals for the double-stream blocks, each `[batch, img_seq, dim]`; fewer
            than blocks are spread over them.
        controlnet_single_block_samples: the same for the single-stream blocks.
        controlnet_blocks_repeat: residuals of double-stream blocks go round instead of being spread.
        image_prompts: embeddings of an IP-Adapter's images, one for each adapter.
        image_prompt_scales: how much they count, float32 `[double-stream blocks, adapters]`; None reads the adapters' own.
        context: packed latents of reference images (Kontext), `[batch, context_seq, channels]`: tokens that the blocks see,
            and that are no part of the image.
        context_ids: their positions `[context_seq, 3]`.
        condition: channels that the transformer sees beside the latents' (Control, Fill), `[batch, img_seq, others]`.

    """

    hidden_states: Float[Tensor, "batch img_seq channels"]
    encoder_hidden_states: Float[Tensor, "batch txt_seq joint_dim"]
    pooled_projections: Float[Tensor, "batch pooled_dim"]
    timestep: Float[Tensor, " batch"]
    img_ids: Float[Tensor, "img_seq 3"]
    txt_ids: Float[Tensor, "txt_seq 3"]
    guidance: Float[Tensor, " batch"] | None
    controlnet_block_samples: tuple[Features, ...] = ()
    controlnet_single_block_samples: tuple[Features, ...] = ()
    controlnet_blocks_repeat: bool = False
    image_prompts: tuple[ImagePrompts, ...] = ()
    image_prompt_scales: Float[Tensor, "blocks adapters"] | None = None
    context: Float[Tensor, "batch context_seq channels"] | None = None
    context_ids: Float[Tensor, "context_seq 3"] | None = None
    condition: Float[Tensor, "batch img_seq others"] | None = None


@typed
def place(inputs: FluxInputs, latents: Velocity, sigma: Level) -> FluxInputs:
    """The same sample at another point of its trajectory.

    Args:
        inputs: conditioning and positions; their latents and timestep are replaced.
        latents: packed latents.
        sigma: noise level, which is the timestep in [0, 1].

    """
    # A copy: torch.cond takes no two inputs that share their memory, and the step holds sigma, too.
    return inputs._replace(hidden_states=latents, timestep=sigma.expand(latents.shape[0]).clone())


def latents_of(inputs: FluxInputs) -> Tensor:
    """What the scheduler steps: `[batch, img_seq, channels]`."""
    return inputs.hidden_states


def prefix_length(inputs: FluxInputs) -> int:
    """Tokens that the blocks see before the image's: text and reference images."""
    return inputs.encoder_hidden_states.shape[1] + (0 if inputs.context is None else inputs.context.shape[1])


@typed
def token_lengths(inputs: FluxInputs) -> Lengths:
    """How many text and image tokens there are."""
    return Lengths(inputs.encoder_hidden_states.shape[1], inputs.hidden_states.shape[1])


def split_tokens(inputs: FluxInputs, take: Callable[[Tensor, int], Tensor]) -> FluxInputs:
    """The inputs with `take(tensor, axis)` in place of everything that has an axis of tokens."""
    return inputs._replace(
        controlnet_block_samples=tuple(take(sample, 1) for sample in inputs.controlnet_block_samples),
        controlnet_single_block_samples=tuple(take(sample, 1) for sample in inputs.controlnet_single_block_samples),
        hidden_states=take(inputs.hidden_states, 1),
        encoder_hidden_states=take(inputs.encoder_hidden_states, 1),
        img_ids=take(inputs.img_ids, 0),
        txt_ids=take(inputs.txt_ids, 0),
        condition=None if inputs.condition is None else take(inputs.condition, 1),
    )


def probe_inputs(transformer: HostModule, *, dtype: torch.dtype, device: torch.device | str) -> FluxInputs:
    """A small pseudo-random sample at sigma 1, always the same, for measurements on the model alone."""
    settings = transformer.config
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    rows = torch.arange(8.0, device=device)
    return FluxInputs(
        hidden_states=draw(1, 64, settings.in_channels),
        encoder_hidden_states=draw(1, 16, settings.joint_attention_dim),
        pooled_projections=draw(1, settings.pooled_projection_dim),
        timestep=torch.ones(1, device=device, dtype=dtype),
        img_ids=torch.cartesian_prod(torch.zeros(1, device=device), rows, rows),
        txt_ids=torch.zeros(16, 3, device=device),
        guidance=torch.full((1,), 3.5, device=device, dtype=torch.float32) if settings.guidance_embeds else None,
    )


def host_arguments(inputs: FluxInputs) -> dict[str, Any]:
    """What `FluxTransformer2DModel.forward` takes for the same call."""
    assert inputs.context is None, "the host knows no context: its tokens are part of hidden_states"
    channels = [inputs.hidden_states, *([] if inputs.condition is None else [inputs.condition])]
    arguments = inputs._replace(hidden_states=torch.cat(channels, dim=2))._asdict()
    if inputs.image_prompts:
        arguments["joint_attention_kwargs"] = {"ip_adapter_image_embeds": list(inputs.image_prompts)}
    for name in ("controlnet_block_samples", "controlnet_single_block_samples"):
        arguments[name] = arguments[name] or None
    ours = ("context", "context_ids", "condition", "image_prompts", "image_prompt_scales")
    return {name: value for name, value in arguments.items() if name not in ours}
