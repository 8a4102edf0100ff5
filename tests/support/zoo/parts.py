"""What tiny pipelines are built of: models with random weights, tokenizers, pictures."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PROMPTS = ("a handwritten two on a palace", "an owl sings of steel")


def build(make: Callable[..., Any], seed: int = 0, gain: float = 0.7, **config: Any) -> Any:
    """A model of a class, with weights that a seed gives it: none is left at the zeros that training starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(**config)
        randomise(model, gain)
    return model.eval()


@torch.no_grad()
def randomise(model: torch.nn.Module, gain: float = 0.7) -> None:
    """Matrices that keep the size of what they multiply times `gain`; norms near 1; small biases and tables."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for name, weight in model.named_parameters():
        last = name.rpartition(".")[2]
        if (
            weight.ndim >= 2
            and last in ("weight", "in_proj_weight")
            and id(weight) not in embeddings
            and weight.shape[1:].numel() > 1
        ):
            weight.normal_(std=gain / weight.shape[1:].numel() ** 0.5)
        elif last in ("weight", "gamma"):
            weight.normal_(mean=0.0 if id(weight) in embeddings else 1.0, std=1.0 if id(weight) in embeddings else 0.1)
        else:
            weight.normal_(std=0.1)


@torch.no_grad()
def scale(model: Any, factor: float, *layers: str) -> Any:
    """The model, with named layers' weights and biases multiplied."""
    for name in layers:
        for weight in model.get_submodule(name).parameters():
            weight.mul_(factor)
    return model


@cache
def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Unit noise; the same tensor object each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def ones(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The same tensor object each time."""
    return torch.ones(*shape, dtype=dtype)


def embeddings(prompt: int, tokens: int, width: int) -> torch.Tensor:
    """A prompt's: the same tensor object each time."""
    return noise(1, tokens, width, seed=100 + prompt)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """A smooth picture, not noise."""
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def tokenizer(*special: str, **options: Any) -> PreTrainedTokenizerFast:
    """One that knows the words of the prompts, and special tokens."""
    words = sorted({word for prompt in PROMPTS for word in prompt.split()})
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<s>", "</s>", *special, *words])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=list(special), **{**names, **options})
