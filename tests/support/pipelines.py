"""Every FLUX.1 pipeline of diffusers, tiny: mini-FLUX's weights where they fit, and what a class needs besides."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import FluxControlNetModel, FluxPriorReduxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

from tests.support.mini_flux import fresh_mini_flux
from tests.support.zoo import parts, parts_image

SIZE = 32
TEXT = {"prompt": "a handwritten two on a palace", "max_sequence_length": 16}
SQUARE = {"height": SIZE, "width": SIZE}


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture, not noise."""
    return parts.picture(SIZE, SIZE, seed, mode)


def mask() -> Image.Image:
    """The right half is to be drawn."""
    return parts_image.mask(SIZE)


class Kind(NamedTuple):
    """A pipeline class and how it is called.

    Attributes:
        name: of the class.
        extra_channels: that its transformer takes beside the latents'.
        arguments: of a call, beside prompt and steps.
        has_controlnet: whether it has one.
        guided: whether it knows true CFG.
        distilled: whether the models published for it take their guidance scale as an input, like FLUX.1-dev.

    """

    name: str
    arguments: Callable[[], dict[str, Any]]
    extra_channels: int = 0
    has_controlnet: bool = False
    guided: bool = False
    distilled: bool = False


KINDS = [
    Kind("FluxPipeline", lambda: SQUARE, guided=True),
    Kind("FluxImg2ImgPipeline", lambda: {"image": picture(), "strength": 0.9, **SQUARE}, guided=True),
    Kind("FluxInpaintPipeline", lambda: {"image": picture(), "mask_image": mask(), "strength": 0.9, **SQUARE}, guided=True),
    Kind("FluxFillPipeline", lambda: {"image": picture(), "mask_image": mask(), **SQUARE}, extra_channels=48, distilled=True),
    Kind("FluxControlPipeline", lambda: {"control_image": picture(), **SQUARE}, extra_channels=32, distilled=True),
    Kind(
        "FluxControlImg2ImgPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "strength": 0.9, **SQUARE},
        extra_channels=32,
        distilled=True,
    ),
    Kind(
        "FluxControlInpaintPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "mask_image": mask(), "strength": 0.9, **SQUARE},
        extra_channels=32,
        distilled=True,
    ),
    Kind("FluxControlNetPipeline", lambda: {"control_image": picture(), **SQUARE}, has_controlnet=True, guided=True),
    Kind(
        "FluxControlNetImg2ImgPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "strength": 0.9, **SQUARE},
        has_controlnet=True,
    ),
    Kind(
        "FluxControlNetInpaintPipeline",
        lambda: {"image": picture(), "control_image": picture(1), "mask_image": mask(), "strength": 0.9, **SQUARE},
        has_controlnet=True,
    ),
    Kind(
        "FluxKontextPipeline",
        lambda: {"image": picture(), "max_area": SIZE**2, "_auto_resize": False, **SQUARE},
        guided=True,
        distilled=True,
    ),
    Kind(
        "FluxKontextInpaintPipeline",
        lambda: {"image": picture(), "mask_image": mask(), "max_area": SIZE**2, "_auto_resize": False, **SQUARE},
        guided=True,
        distilled=True,
    ),
]
BY_NAME = {kind.name: kind for kind in KINDS}


def make(kind: Kind, *, double: int = 2, single: int = 2) -> Any:
    """A pipeline of a few of mini-FLUX's blocks."""
    mini = fresh_mini_flux()
    parts: dict[str, Any] = {name: part for name, part in mini.components.items() if part is not None}
    parts["transformer"] = shorten(mini.transformer, double, single, kind.extra_channels, kind.distilled)
    if kind.has_controlnet:
        parts["controlnet"] = make_controlnet(mini.transformer)
    pipe = getattr(diffusers, kind.name)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shorten(transformer: Any, double: int, single: int, extra_channels: int, guidance_embeds: bool) -> Any:
    """The first blocks of both kinds, and an embedding that takes more channels, and a guidance scale perhaps."""
    config = dict(transformer.config)
    channels = config["in_channels"]
    changes = {"in_channels": channels + extra_channels, "out_channels": channels}
    changes |= {"num_layers": double, "num_single_layers": single, "guidance_embeds": guidance_embeds}
    torch.manual_seed(0)
    short: Any = FluxTransformer2DModel.from_config({**config, **changes})
    own = short.state_dict()
    weights = {name: value for name, value in transformer.state_dict().items() if name in own}
    embedding = own["x_embedder.weight"]
    embedding[:, :channels] = weights["x_embedder.weight"]
    embedding[:, channels:] *= 0.3
    short.load_state_dict({**own, **weights, "x_embedder.weight": embedding})
    return short.eval()


def make_controlnet(transformer: Any, *, double: int = 1, single: int = 1) -> Any:
    """One whose residuals are not the zeros that training starts from."""
    config = {key: value for key, value in transformer.config.items() if key not in ("out_channels",)}
    torch.manual_seed(1)
    net: Any = FluxControlNetModel.from_config({**config, "num_layers": double, "num_single_layers": single})
    for block in [*net.controlnet_blocks, *net.controlnet_single_blocks, net.controlnet_x_embedder]:
        torch.nn.init.normal_(block.weight, std=0.1)
    return net.eval()


def make_prior(pipe: Any) -> Any:
    """Redux: it makes prompt embeddings of a picture, with the text encoders of a pipeline."""
    width: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(2)
    encoder = SiglipVisionModel(SiglipVisionConfig(image_size=16, patch_size=8, **width))
    texts = {name: getattr(pipe, name) for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")}
    embedder = ReduxImageEncoder(redux_dim=16, txt_in_features=pipe.transformer.config.joint_attention_dim)
    features = SiglipImageProcessor(size={"height": 16, "width": 16})
    return FluxPriorReduxPipeline(encoder.eval(), features, embedder.eval(), **texts)


def draw(pipe: Any, kind: Kind, *, steps: int = 12, seed: int = 0, **changes: Any) -> torch.Tensor:
    """Final latents of one image."""
    arguments = {**TEXT, **kind.arguments(), "num_inference_steps": steps, **changes}
    generator = torch.Generator().manual_seed(seed)
    return pipe(**arguments, generator=generator, output_type="latent").images


def load_ip_adapters(pipe: Any, count: int) -> None:
    """Through diffusers' own loader, from weights of the checkpoint's shapes."""
    width, text = pipe.transformer.inner_dim, pipe.transformer.config.joint_attention_dim

    def weights(seed: int) -> dict[str, dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return 0.3 * torch.randn(*shape, generator=generator)

        projection = {"proj.weight": random(4 * text, 16), "proj.bias": random(4 * text)}
        projection |= {"norm.weight": torch.ones(text), "norm.bias": torch.zeros(text)}
        adapter = {}
        for index in range(len(pipe.transformer.transformer_blocks)):
            for name in ("to_k_ip", "to_v_ip"):
                adapter |= {f"{index}.{name}.weight": random(width, text), f"{index}.{name}.bias": random(width)}
        return {"image_proj": projection, "ip_adapter": adapter}

    pipe.transformer._load_ip_adapter_weights([weights(seed) for seed in range(count)], low_cpu_mem_usage=False)
    pipe.set_ip_adapter_scale([0.5] * count if count > 1 else 0.5)
