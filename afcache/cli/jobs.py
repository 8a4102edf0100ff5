"""What the command line draws: prompts, seeds, and the names of their files."""

import argparse
import hashlib
from dataclasses import dataclass

# Of the models that are built in, by name.
_PROMPTS = {
    "mini-flux": (
        "a handwritten seven on a flower",
        "a handwritten three on a palace",
        "a handwritten five on a flower",
        "a handwritten eight on a palace",
    ),
    "mini-wan": (
        "a handwritten seven moves left over a flower",
        "a handwritten three moves up over a palace",
        "a handwritten five moves right over a flower",
    ),
}


@dataclass(frozen=True)
class Job:
    """One picture or video to draw, and its file name without extension."""

    prompt: str
    seed: int
    stem: str

    @property
    def line(self) -> str:
        """The prompt in one line."""
        return " ".join(self.prompt.split())

    @property
    def label(self) -> str:
        """The prompt's beginning and the seed, as tables name what was drawn."""
        return f"{self.line[:34]} #{self.seed}"


def make_jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every prompt with the same seeds; the default prompts with one seed each, to show different pictures.

    Raises:
        ValueError: there is no prompt, and the model has no default ones.

    """
    seeds = [arguments.seed + i for i in range(arguments.num_images)]
    if arguments.prompt:
        pairs = [(prompt, seed) for prompt in arguments.prompt for seed in seeds]
    else:
        name = arguments.model or "mini-flux"
        if name not in _PROMPTS:
            raise ValueError(f"--prompt is needed with --model {name}; only {' and '.join(_PROMPTS)} have default prompts.")
        pairs = [(prompt, seed + i) for i, prompt in enumerate(_PROMPTS[name]) for seed in seeds]
    stems: list[str] = []
    for prompt, seed in pairs:
        stem = f"{_name(prompt)}_seed{seed}"
        # The same prompt may be asked for twice; no picture overwrites another.
        stems.append(stem if stem not in stems else f"{stem}_{len(stems)}")
    return [Job(prompt, seed, stem) for (prompt, seed), stem in zip(pairs, stems, strict=True)]


def example_of(model: str) -> str:
    """A prompt for a model that is built in; none for others."""
    return _PROMPTS.get(model, ("",))[0]


def _name(prompt: str) -> str:
    """A prompt as a file name: its words, and where these leave something out, a mark that tells it from all others."""
    words = "".join(letter if letter.isalnum() else "_" for letter in prompt.lower())[:40].strip("_")
    if words.replace("_", " ") == prompt:
        return words
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return f"{words}_{mark}" if words else mark
