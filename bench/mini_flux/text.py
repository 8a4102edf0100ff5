"""Tokenizers and text encoders for mini-FLUX: real CLIP and T5 classes, built and trained offline.

The vocabularies hold the words of the training prompts whole and everything else letter by letter, so any text can be
encoded. The encoders learn to tell digits and places apart from all wordings, and are frozen afterwards.
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

from bench.mini_flux import data

TEXT_LENGTH = 16
TEXT_DIM = 64
_LETTERS = string.ascii_letters + string.digits + string.punctuation


def corpus() -> list[str]:
    """Every training prompt, lower case and capitalised."""
    lower = [text for digit in range(10) for place in range(2) for text in data.prompts_for(digit, place)]
    return lower + [text[0].upper() + text[1:] for text in lower]


def build_clip_tokenizer() -> CLIPTokenizer:
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
    words = [text.lower() for text in corpus()]
    tokenizer.train_from_iterator([*words, " ".join(sorted(set(_LETTERS.lower())))], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=TEXT_LENGTH)


def build_t5_tokenizer() -> T5Tokenizer:
    """Make a Unigram vocabulary: whole prompt words first, letters as the expensive fallback."""
    words = sorted({word for text in corpus() for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words]
    pieces += [(letter, -8.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


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
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=TEXT_DIM,
            d_kv=16,
            d_ff=2 * TEXT_DIM,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip, t5


def encode(
    prompts: list[str],
    clip_tokenizer: CLIPTokenizer,
    clip: CLIPTextModel,
    t5_tokenizer: T5Tokenizer,
    t5: T5EncoderModel,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode as FluxPipeline does: `(prompt_embeds [batch, 16, 64], pooled_prompt_embeds [batch, 64])`."""
    options = {"padding": "max_length", "max_length": TEXT_LENGTH, "truncation": True, "return_tensors": "pt"}
    prompt_embeds = t5(t5_tokenizer(prompts, **options).input_ids)[0]
    pooled = clip(clip_tokenizer(prompts, **options).input_ids).pooler_output
    return prompt_embeds, pooled


_FOLDERS = {
    "tokenizer": CLIPTokenizer,
    "text_encoder": CLIPTextModel,
    "tokenizer_2": T5Tokenizer,
    "text_encoder_2": T5EncoderModel,
}


def load_or_train_encoders(folder: Path, *, steps: int, seed: int) -> tuple[Any, ...]:
    """Return `(clip_tokenizer, clip, t5_tokenizer, t5)`, frozen; trained once, then kept in `folder`."""
    if not folder.exists():
        parts = train_encoders(steps=steps, seed=seed)
        for name, part in zip(_FOLDERS, parts, strict=True):
            part.save_pretrained(folder / name)
        return parts
    parts = tuple(cls.from_pretrained(folder / name) for name, cls in _FOLDERS.items())
    for encoder in parts[1::2]:
        encoder.eval().requires_grad_(False)
    return parts


def train_encoders(*, steps: int, seed: int) -> tuple[Any, ...]:
    """Train both encoders to name digit and place from any wording; return them frozen, with their tokenizers."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    clip, t5 = build_encoders(clip_tokenizer, t5_tokenizer)
    heads = nn.ModuleList([nn.Linear(TEXT_DIM, 12) for _ in range(2)])
    optimizer = torch.optim.AdamW([*clip.parameters(), *t5.parameters(), *heads.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        digits = torch.randint(0, 10, (64,), generator=generator)
        places = torch.randint(0, 2, (64,), generator=generator)
        wordings = torch.randint(0, 10_000, (64,), generator=generator).tolist()
        prompts = []
        for digit, place, wording in zip(digits.tolist(), places.tolist(), wordings, strict=True):
            choices = data.prompts_for(digit, place)
            text = choices[wording % len(choices)]
            prompts.append(text if wording % 2 else text[0].upper() + text[1:])
        prompt_embeds, pooled = encode(prompts, clip_tokenizer, clip, t5_tokenizer, t5)
        logits = [heads[0](prompt_embeds.mean(1)), heads[1](pooled)]
        losses = [F.cross_entropy(x[:, :10], digits) + F.cross_entropy(x[:, 10:], places) for x in logits]
        optimizer.zero_grad()
        sum(losses, start=torch.zeros(())).backward()
        optimizer.step()
    print(f"text encoders: losses after {steps} steps {[round(loss.item(), 4) for loss in losses]}")
    return clip_tokenizer, clip.eval().requires_grad_(False), t5_tokenizer, t5.eval().requires_grad_(False)
