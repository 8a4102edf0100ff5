"""How the tests sample mini-FLUX."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict

import afcache
from afcache import CacheConfig
from tests.support.mini_flux import fresh_mini_flux

PROMPT = "a handwritten seven on a flower"
ADAPTIVE = CacheConfig(target="noise", tolerance=0.02, warmup_steps=2)
RESIDUAL = CacheConfig(tolerance=0.02, warmup_steps=2)


def compiled(pipe: Any, config: CacheConfig = ADAPTIVE, **options: Any) -> Any:
    """The pipeline, cached, run eagerly."""
    return afcache.compile_pipeline(pipe, config, compile=False, **options)


def shorten(pipe: Any) -> Any:
    """Leave two of mini-FLUX's blocks, one of each kind: they compile in a quarter of the time."""
    pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
    pipe.transformer.single_transformer_blocks = pipe.transformer.single_transformer_blocks[:1]
    pipe.transformer.register_to_config(num_layers=1, num_single_layers=1)
    return pipe


def sample(
    pipe: Any, seed: int | list[int] = 0, *, steps: int = 28, cfg: float = 1.0, prompt: str | list[str] = PROMPT, **options: Any
) -> np.ndarray:
    """Draw with the recommended settings; float pixels `[batch, height, width, 3]`, or latents."""
    generators = (
        [torch.Generator().manual_seed(s) for s in seed] if isinstance(seed, list) else torch.Generator().manual_seed(seed)
    )
    options = {"height": 32, "width": 32, "max_sequence_length": 16, "output_type": "np", **options}
    if cfg > 1:
        empty = "" if isinstance(prompt, str) else [""] * len(prompt)
        options.update(true_cfg_scale=cfg, negative_prompt=empty)
    images = pipe(prompt, num_inference_steps=steps, generator=generators, **options).images
    return images.numpy() if isinstance(images, torch.Tensor) else images


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.abs(first.astype(np.float64) - second).max())


def page_example(call: str, page: str = "functional") -> str:
    """The one example of a page of docs/ that makes this call."""
    text = (Path(__file__).parent.parent.parent / "docs" / f"{page}.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if call in block)
    return example


def make_lora(folder: Any, pipe: Any = None) -> None:
    """Save a LoRA over a copy of the transformer, mini-FLUX's by default, that changes its images visibly."""
    pipe = fresh_mini_flux() if pipe is None else copy.deepcopy(pipe)
    pipe.transformer.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False)
    )
    layers: Any = get_peft_model_state_dict(pipe.transformer)
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=layers)
