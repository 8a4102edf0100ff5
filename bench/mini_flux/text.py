"""Tokenizers and text encoders of the small models: real CLIP and T5 classes, built and trained offline.

The vocabularies hold the words of the training prompts whole and everything else letter by letter, so any text can be
encoded. The encoders learn to tell the values of a class apart from all wordings, and are frozen afterwards.
"""

import json
import string
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from bench.mini_flux.parts import TEXT_DIM
from bench.mini_flux.recipe import MINI_FLUX, Recipe

_LETTERS = string.ascii_letters + string.digits + string.punctuation
# Of the T5 encoders of all small models.
T5_SHAPE: dict[str, Any] = {
    "d_model": TEXT_DIM,
    "d_kv": 16,
    "d_ff": 2 * TEXT_DIM,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "feed_forward_proj": "gated-gelu",
}


def corpus(recipe: Recipe = MINI_FLUX) -> list[str]:
    """Every training prompt, lower case and capitalised."""
    lower = [text for values in recipe.classes for text in recipe.wordings(*values)]
    return lower + [text[0].upper() + text[1:] for text in lower]


def build_clip_tokenizer(recipe: Recipe = MINI_FLUX) -> CLIPTokenizer:
    """Train a byte-level BPE on the prompts, single letters included."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=end))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[start, end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    words = [text.lower() for text in corpus(recipe)]
    tokenizer.train_from_iterator([*words, " ".join(sorted(set(_LETTERS.lower())))], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=recipe.text_length)


def build_t5_tokenizer(recipe: Recipe = MINI_FLUX) -> T5Tokenizer:
    """Make a Unigram vocabulary: whole prompt words first, letters as the expensive fallback."""
    words = sorted({word for text in corpus(recipe) for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words]
    pieces += [(letter, -8.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=recipe.text_length)


def build_encoders(clip_tokenizer: Any, t5_tokenizer: Any) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Make the two untrained encoders, width 64, two layers each, float32."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=2 * TEXT_DIM,
            projection_dim=TEXT_DIM,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=clip_tokenizer.model_max_length,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), **T5_SHAPE))
    return clip, t5


def encode(
    prompts: list[str],
    clip_tokenizer: CLIPTokenizer,
    clip: CLIPTextModel,
    t5_tokenizer: T5Tokenizer,
    t5: T5EncoderModel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode as FluxPipeline does: `(prompt_embeds [batch, 16, 64], pooled_prompt_embeds [batch, 64])`."""
    length = clip_tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    prompt_embeds = t5(t5_tokenizer(prompts, **options).input_ids)[0]
    pooled = clip(clip_tokenizer(prompts, **options).input_ids).pooler_output
    return prompt_embeds, pooled


_FOLDERS = {
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModel,
    "tokenizer_2": T5Tokenizer,
    "text_encoder_2": T5EncoderModel,
}


def load_or_train_encoders(recipe: Recipe, folder: Path, *, steps: int, seed: int) -> tuple[Any, ...]:
    """Return `(clip_tokenizer, clip, t5_tokenizer, t5)`, frozen; trained once, then kept in `folder`."""
    if not folder.exists():
        parts = train_encoders(recipe, steps=steps, seed=seed)
        for name, part in zip(_FOLDERS, parts, strict=True):
            part.save_pretrained(folder / name)
        return parts
    parts = tuple(cls.from_pretrained(folder / name) for name, cls in _FOLDERS.items())
    for encoder in parts[1::2]:
        encoder.eval().requires_grad_(False)
    return parts


def train_encoders(recipe: Recipe, *, steps: int, seed: int) -> tuple[Any, ...]:
    """Train both encoders to name a class's values from any wording; return them frozen, with their tokenizers."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(recipe), build_t5_tokenizer(recipe)
    clip, t5 = build_encoders(clip_tokenizer, t5_tokenizer)
    heads = nn.ModuleList([nn.Linear(TEXT_DIM, sum(recipe.sizes)) for _ in range(2)])
    optimizer = torch.optim.AdamW([*clip.parameters(), *t5.parameters(), *heads.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)

    def read(prompts: list[str]) -> list[tuple[torch.Tensor, ...]]:
        prompt_embeds, pooled = encode(prompts, clip_tokenizer, clip, t5_tokenizer, t5)
        return [x.split(recipe.sizes, dim=1) for x in (heads[0](prompt_embeds.mean(1)), heads[1](pooled))]

    for _ in range(steps):
        values = [torch.randint(0, size, (64,), generator=generator) for size in recipe.sizes]
        wordings = torch.randint(0, 10_000, (64,), generator=generator).tolist()
        prompts = []
        for *chosen, wording in zip(*(value.tolist() for value in values), wordings, strict=True):
            choices = recipe.wordings(*chosen)
            text = choices[wording % len(choices)]
            prompts.append(text if wording % 2 else text[0].upper() + text[1:])
        losses = [sum(map(F.cross_entropy, logits, values), start=torch.zeros(())) for logits in read(prompts)]
        optimizer.zero_grad()
        sum(losses, start=torch.zeros(())).backward()
        optimizer.step()
    print(f"text encoders: losses after {steps} steps {[round(loss.item(), 4) for loss in losses]}")
    truth = torch.tensor([values for values in recipe.classes for _ in recipe.wordings(*values)] * 2)
    with torch.no_grad():
        read_values = [torch.stack([x.argmax(1) for x in logits], dim=1) for logits in read(corpus(recipe))]
    shares = [round((found == truth).all(1).double().mean().item(), 4) for found in read_values]
    print(f"text encoders: T5 and CLIP read the whole class from {shares} of all wordings", flush=True)
    return clip_tokenizer, clip.eval().requires_grad_(False), t5_tokenizer, t5.eval().requires_grad_(False)
