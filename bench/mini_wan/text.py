"""Tokenizer and text encoder for mini-Wan: real T5 tokenizer and UMT5 classes, built and trained offline.

The vocabulary holds the words of the training prompts whole and everything else letter by letter, so any text can be
encoded. The encoder learns to tell digits, directions and places apart from all wordings, and is frozen afterwards.
"""

import string
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from bench.mini_flux.text import T5_SHAPE, TEXT_DIM
from bench.mini_wan import data

TEXT_LENGTH = 24
_LETTERS = string.ascii_letters + string.digits + string.punctuation
_SIZES = (10, 4, 2)
_CLASSES = [(digit, way, place) for digit in range(10) for way in range(4) for place in range(2)]


def wordings() -> list[str]:
    """Every training prompt in lower case: 28 for each class, by digit, then direction, then place."""
    return [text for numbers in _CLASSES for text in data.prompts_for(*numbers)]


def corpus() -> list[str]:
    """Every training prompt, lower case and capitalised."""
    lower = wordings()
    return lower + [text[0].upper() + text[1:] for text in lower]


def build_tokenizer() -> T5Tokenizer:
    """Make a Unigram vocabulary: whole prompt words first, letters as the expensive fallback."""
    words = sorted({word for text in corpus() for word in text.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words]
    pieces += [(letter, -8.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)


def build_encoder(tokenizer: Any) -> UMT5EncoderModel:
    """Make the untrained encoder, width 64, two layers, float32."""
    return UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **T5_SHAPE))


def encode(prompts: list[str], tokenizer: Any, encoder: Any) -> torch.Tensor:
    """Encode as WanPipeline does: `[batch, 24, 64]`, zeros after each prompt's end, which nothing masks later."""
    tokens = tokenizer(prompts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt")
    mask = tokens.attention_mask.to(encoder.device)
    states = encoder(tokens.input_ids.to(encoder.device), mask).last_hidden_state
    return states * mask[..., None]


def load_or_train(folder: Path, *, steps: int, seed: int) -> tuple[Any, Any]:
    """Return `(tokenizer, encoder)`, frozen; trained once, then kept in `folder`."""
    if not folder.exists():
        tokenizer, encoder = train(steps=steps, seed=seed)
        tokenizer.save_pretrained(folder / "tokenizer")
        encoder.save_pretrained(folder / "text_encoder")
        return tokenizer, encoder
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    return tokenizer, UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)


def train(*, steps: int, seed: int) -> tuple[Any, Any]:
    """Train the encoder to name digit, direction and place from any wording; return it frozen, with its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    encoder = build_encoder(tokenizer)
    head = nn.Linear(TEXT_DIM, sum(_SIZES))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    prompts = corpus()
    repeats = len(prompts) // 2 // len(_CLASSES)
    targets = torch.tensor(_CLASSES).repeat_interleave(repeats, dim=0).repeat(2, 1)

    def logits_of(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states = encode([prompts[row] for row in rows.tolist()], tokenizer, encoder)
        return head(states.sum(1) / states.abs().sum(2).gt(0).sum(1, keepdim=True)).split(_SIZES, dim=1)

    for _ in range(steps):
        rows = torch.randint(0, len(prompts), (64,), generator=generator)
        loss = sum((F.cross_entropy(x, targets[rows, which]) for which, x in enumerate(logits_of(rows))), start=torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        answers = torch.stack([x.argmax(1) for x in logits_of(torch.arange(len(prompts)))], dim=1)
    accuracy = (answers == targets).float().mean(0).tolist()
    print(f"text encoder: accuracy over all wordings, digit, direction, place: {[round(x, 4) for x in accuracy]}")
    return tokenizer, encoder.eval().requires_grad_(False)
