"""A call of FLUX.1's transformer, as diffusers' pipelines make it, answered by a cached forward."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from afcache._typing import HostModule
from afcache.models.family import Call
from afcache.models.flux1.architecture import image_prompt_scales
from afcache.models.flux1.inputs import FluxInputs

# In what the guidance branches of an image differ.
OF_BRANCHES = ("encoder_hidden_states", "pooled_projections", "txt_ids", "image_prompts")


class Reader:
    """Reads what of a call is no argument of its own, once for each tensor or value that may change.

    Args:
        transformer: the host's `FluxTransformer2DModel`.

    """

    def __init__(self, transformer: HostModule) -> None:
        self._transformer = transformer
        self._context: tuple[weakref.ref[Tensor], int] | None = None
        self._scales: tuple[Any, Tensor] | None = None

    @property
    def has_context(self) -> bool:
        """Whether the last call had reference images."""
        return self._context is not None and self._context[1] > 0

    def context_length(self, img_ids: Tensor) -> int:
        """Tokens of reference images; waits for the device once for each tensor of positions: pipelines make one an image."""
        if self._context is None or self._context[0]() is not img_ids:
            self._context = (weakref.ref(img_ids), context_length(img_ids))
        return self._context[1]

    def prompt_scales(self, device: torch.device) -> Tensor:
        """Scales of image prompts as a tensor: they may change at every step, and as numbers each would be one graph more."""
        key = (image_prompt_scales(self._transformer), device)
        if self._scales is None or self._scales[0] != key:
            self._scales = (key, torch.tensor(key[0], dtype=torch.float32, device=device))
        return self._scales[1]


def read_call(inputs: FluxInputs) -> Call:
    """What the runtime asks of a call."""
    return Call(
        inputs=inputs,
        latents=inputs.hidden_states,
        source=inputs.hidden_states,
        timestep=inputs.timestep,
        prefix_length=sum(part.shape[1] for part in (inputs.encoder_hidden_states, inputs.context) if part is not None),
        conditions=_conditions(inputs),
        is_controlled=_is_controlled(inputs),
        structure=_structure(inputs),
    )


def _structure(value: Any) -> Any:
    """Shapes of tensors, in their places."""
    if isinstance(value, tuple):
        return tuple(map(_structure, value))
    return value.shape if isinstance(value, Tensor) else value


def _conditions(inputs: FluxInputs) -> tuple[Tensor, ...]:
    """What pipelines hand over unchanged from step to step."""
    given = (tensor for tensor in (inputs.guidance, inputs.image_prompt_scales) if tensor is not None)
    return (inputs.encoder_hidden_states, inputs.pooled_projections, *inputs.image_prompts, *given)


def _is_controlled(inputs: FluxInputs) -> Tensor | None:
    """Whether the sum of ControlNets' residuals is other than 0, 0-d; None where there are none."""
    first = [*inputs.controlnet_block_samples[:1], *inputs.controlnet_single_block_samples[:1]]
    return torch.stack([sample.any() for sample in first]).any() if first else None


def describe(inputs: FluxInputs, *, is_later: bool) -> dict[str, Any]:
    """What must be equal on all ranks that draw one image, by the names that a user knows; the same names for all inputs.

    Args:
        inputs: of a call.
        is_later: whether it is of a later step than the first.

    """
    latents = "true_cfg_scale, callbacks or scheduler options" if is_later else "latents or seeds"
    residuals = [*inputs.controlnet_block_samples, *inputs.controlnet_single_block_samples]
    return {
        "prompts (encoder_hidden_states)": inputs.encoder_hidden_states,
        "prompts (pooled_projections)": inputs.pooled_projections,
        f"{latents} (hidden_states)": inputs.hidden_states,
        "image sizes (img_ids)": inputs.img_ids,
        "reference images (context)": 0.0 if inputs.context is None else inputs.context,
        "image prompts (IP-Adapters)": torch.cat([p.flatten() for p in inputs.image_prompts]) if inputs.image_prompts else 0.0,
        "image prompts (scales)": 0.0 if inputs.image_prompt_scales is None else inputs.image_prompt_scales,
        "ControlNets (their number of residuals)": len(residuals),
        "ControlNets (controlnet_block_samples)": residuals[0] if residuals and not is_later else 0.0,
        "guidance scales": 0.0 if inputs.guidance is None else inputs.guidance,
    }


def context_length(img_ids: Tensor) -> int:
    """How many tokens at the end of a sequence belong to reference images; waits for the device.

    Kontext numbers images along the first position: 0 is the one that is drawn.
    """
    is_context = img_ids[:, 0] != 0
    count = int(is_context.sum())
    return count if count < len(img_ids) and bool(is_context[len(img_ids) - count :].all()) else 0


def split_context(inputs: FluxInputs, length: int) -> FluxInputs:
    """The inputs with the last `length` tokens as context; fresh: torch.cond takes no two views of one tensor.

    A ControlNet's residuals are for all tokens, and the blocks see the context first.
    """
    if not length:
        return inputs
    image = inputs.hidden_states.shape[1] - length

    def own(part: Tensor) -> Tensor:
        return part.clone(memory_format=torch.contiguous_format)

    return inputs._replace(
        controlnet_block_samples=tuple(sample.roll(length, 1) for sample in inputs.controlnet_block_samples),
        controlnet_single_block_samples=tuple(sample.roll(length, 1) for sample in inputs.controlnet_single_block_samples),
        hidden_states=own(inputs.hidden_states[:, :image]),
        img_ids=own(inputs.img_ids[:image]),
        context=own(inputs.hidden_states[:, image:]),
        context_ids=own(inputs.img_ids[image:]),
    )


def split_condition(inputs: FluxInputs, channels: int) -> FluxInputs:
    """The inputs with the channels beyond the latents' own as condition: Control and Fill pipelines append them."""
    latents = inputs.hidden_states
    if latents.shape[2] == channels:
        return inputs
    return inputs._replace(hidden_states=latents[..., :channels].contiguous(), condition=latents[..., channels:].contiguous())


@apply_lora_scale("joint_attention_kwargs")
def answer(
    transformer: HostModule,
    reader: Reader,
    forward: Callable[[Call], Tensor],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    pooled_projections: Tensor,
    timestep: Tensor,
    img_ids: Tensor,
    txt_ids: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    controlnet_block_samples: Any = None,
    controlnet_single_block_samples: Any = None,
    return_dict: bool = True,
    controlnet_blocks_repeat: bool = False,
) -> Transformer2DModelOutput | tuple[Tensor]:
    """`FluxTransformer2DModel.forward`, whose arguments follow the first three, by another forward.

    Args:
        transformer: the host's, whose adapters are scaled as the call asks.
        reader: of its calls.
        forward: from a call to the velocity of the image tokens.

    """
    options = dict(joint_attention_kwargs or {})
    image_prompts = tuple(options.pop("ip_adapter_image_embeds", None) or ())
    if options:
        raise NotImplementedError(
            f"joint_attention_kwargs {sorted(options)} are not supported under caching ('scale' and "
            "'ip_adapter_image_embeds' are). Leave them out, or call afcache.restore_pipeline(pipe) first."
        )
    positions = img_ids[0] if img_ids.ndim == 3 else img_ids
    inputs = FluxInputs(
        hidden_states=hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        pooled_projections=pooled_projections,
        timestep=timestep,
        img_ids=positions,
        txt_ids=txt_ids[0] if txt_ids.ndim == 3 else txt_ids,
        guidance=guidance,
        controlnet_block_samples=tuple(controlnet_block_samples or ()),
        controlnet_single_block_samples=tuple(controlnet_single_block_samples or ()),
        controlnet_blocks_repeat=bool(controlnet_blocks_repeat),
        image_prompts=image_prompts,
        image_prompt_scales=reader.prompt_scales(hidden_states.device) if image_prompts else None,
    )
    inputs = split_condition(inputs, transformer.out_channels)
    call = read_call(split_context(inputs, reader.context_length(positions)))
    image = call.latents.shape[1]

    def ask(host: Callable[..., Any]) -> Tensor:
        velocity = host(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
            joint_attention_kwargs=joint_attention_kwargs,
            controlnet_block_samples=controlnet_block_samples,
            controlnet_single_block_samples=controlnet_single_block_samples,
            controlnet_blocks_repeat=controlnet_blocks_repeat,
            return_dict=False,
        )[0]
        return velocity[:, :image].contiguous()

    velocity = forward(call._replace(ask=ask, source=hidden_states))
    # Pipelines throw away what is said of reference images, so it is not computed.
    missing = hidden_states.shape[1] - velocity.shape[1]
    velocity = F.pad(velocity, (0, 0, 0, missing)) if missing else velocity
    return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)
