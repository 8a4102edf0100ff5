"""Does a small model draw what the prompt says? Judged by a classifier that has seen real images only.

    python -m bench.mini_flux.evaluate --images 200
    python -m bench.mini_flux.evaluate --recipe strokes --device cuda --sheet strokes.png

The judge is a support vector machine on real images (rendered digits, crops of pictures); its accuracy on held-out real
images is printed beside the model's, which cannot mean more. Accuracy is a sanity floor and ranks no cache: over-cached
samples collapse to prototypes, which are easier to read.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.mini_flux import sampling
from bench.mini_flux.recipe import MINI_FLUX, RECIPES, Recipe
from bench.record.recording import write_result
from bench.record.render import table

_COPIES = 4
_BATCH = 50


def features(images: torch.Tensor, recipe: Recipe = MINI_FLUX) -> np.ndarray:
    """What the judge sees of images `[count, 3, height, width]` in [-1, 1]: `[count, features]`."""
    return recipe.features(images)


def train_judge(recipe: Recipe = MINI_FLUX) -> tuple[Any, float]:
    """Fit the judge on real training images; return it with its accuracy on held-out ones."""
    source, generator = recipe.source("cpu"), torch.Generator().manual_seed(1)
    images, labels = zip(*(source.examples(generator, held_out=False) for _ in range(_COPIES)), strict=True)
    judge = recipe.judge().fit(np.concatenate([recipe.features(x) for x in images]), torch.cat(labels).numpy())
    images, labels = source.examples(generator, held_out=True)
    return judge, float(judge.score(recipe.features(images), labels.numpy()))


def sample(pipe: Any, count: int, *, cfg: float, steps: int, recipe: Recipe = MINI_FLUX) -> torch.Tensor:
    """Images `[count, 3, height, width]` in [-1, 1] of seeds 0 to count - 1, in batches; on the CPU."""
    images = []
    for start in range(0, count, _BATCH):
        seeds = range(start, min(start + _BATCH, count))
        problem = sampling.prepare(pipe, seeds, steps=steps, cfg=cfg, recipe=recipe)
        images.append(torch.from_numpy(sampling.decode(pipe, problem.latents, recipe)))
    return torch.cat(images).permute(0, 3, 1, 2) * 2 - 1


def sheet(images: torch.Tensor, path: str) -> None:
    """Write the first 40 images as a contact sheet, ten a row, enlarged four times."""
    images = images[: min(40, len(images) // 10 * 10)]
    count, _, height, width = images.shape
    rows = images.reshape(count // 10, 10, 3, height, width).permute(0, 3, 1, 4, 2)
    picture = rows.reshape(count // 10 * height, 10 * width, 3)
    bytes_ = ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    enlarged = (picture.shape[1] * 4, picture.shape[0] * 4)
    Image.fromarray(bytes_).resize(enlarged, Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Evaluate without and with CFG 2, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default=MINI_FLUX.name)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--model", type=Path, help="another folder of the same kind (default: the recipe's); writes no result")
    parser.add_argument("--sheet", help="also write a contact sheet of the CFG 2 images to this file")
    arguments = parser.parse_args()
    recipe = RECIPES[arguments.recipe]
    if arguments.model:
        recipe = dataclasses.replace(recipe, folder=arguments.model)
    pipe = sampling.load(recipe).to(arguments.device)
    judge, hold_out = train_judge(recipe)
    subjects = np.array([recipe.subject_of(seed) for seed in range(arguments.images)])
    rows = []
    for cfg in (1.0, 2.0):
        images = sample(pipe, arguments.images, cfg=cfg, steps=arguments.steps, recipe=recipe)
        accuracy = float((judge.predict(features(images, recipe)) == subjects).mean())
        error = (accuracy * (1 - accuracy) / arguments.images) ** 0.5
        rows.append({"true CFG": cfg, "images": arguments.images, "accuracy": accuracy, "standard error": error})
    if arguments.sheet:
        sheet(images, arguments.sheet)
    notes = [
        f"{arguments.steps} steps, uncached, classes in turn. The judge, a support vector machine trained on real images "
        f"only, reads held-out real ones with accuracy {hold_out:.3f}.",
    ]
    print(table(rows))
    print(f"judge on held-out real images: {hold_out:.3f}")
    if not arguments.model:
        name = recipe.name.replace("-", "_")
        title = "What mini-FLUX draws" if recipe is MINI_FLUX else f'What "{recipe.name}" draws'
        print(write_result(f"{name}_accuracy", title, rows, notes=notes, device=arguments.device))


if __name__ == "__main__":
    main()
