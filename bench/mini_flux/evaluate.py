"""Does mini-FLUX draw what the prompt says? Judged by a classifier that has seen real digits only.

    python -m bench.mini_flux.evaluate --images 200

The judge is a support vector machine on real digits through the same rendering; its accuracy on held-out real digits is
printed beside the model's, which cannot mean more. Accuracy is a sanity floor and ranks no cache: over-cached samples
collapse to prototypes, which are easier to read.
"""

import argparse
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image
from sklearn.svm import SVC

from bench.mini_flux import data, sampling
from bench.record.recording import write_result
from bench.record.render import table

_COPIES = 4
_BATCH = 50


def features(images: torch.Tensor) -> np.ndarray:
    """What the judge looks at: brightness, the darkest colour channel, `[count, 32 * 32]`."""
    return images.min(dim=1).values.flatten(1).numpy()


def train_judge() -> tuple[SVC, float]:
    """Fit the judge on rendered training digits; return it with its accuracy on rendered held-out digits."""
    digits, photographs = data.load_split(), data.load_photographs()
    generator = torch.Generator().manual_seed(1)

    def rendered(images: torch.Tensor) -> np.ndarray:
        places = torch.randint(0, 2, (len(images),), generator=generator)
        return features(data.render(images, places, photographs, generator))

    train = np.concatenate([rendered(digits.train_images) for _ in range(_COPIES)])
    judge = SVC(C=10, gamma="scale").fit(train, np.tile(digits.train_labels.numpy(), _COPIES))
    return judge, float(judge.score(rendered(digits.test_images), digits.test_labels.numpy()))


def sample(pipe: Any, count: int, *, cfg: float, steps: int) -> torch.Tensor:
    """Images `[count, 3, 32, 32]` in [-1, 1] of seeds 0 to count - 1, in batches."""
    images = []
    for start in range(0, count, _BATCH):
        seeds = range(start, min(start + _BATCH, count))
        prompts = [sampling.prompt_of(seed) for seed in seeds]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"true_cfg_scale": cfg, "negative_prompt": [""] * len(prompts)} if cfg > 1 else {}
        output = pipe(
            prompts,
            num_inference_steps=steps,
            generator=generators,
            output_type="pt",
            **sampling.SETTINGS,
            **options,
        )
        images.append(output.images * 2 - 1)
    return torch.cat(images)


def sheet(images: torch.Tensor, path: str) -> None:
    """Write the first 20 images as a contact sheet, enlarged eight times."""
    rows = images[:20].reshape(2, 10, 3, 32, 32)
    picture = rows.permute(0, 3, 1, 4, 2).reshape(64, 320, 3)
    bytes_ = ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    Image.fromarray(bytes_).resize((320 * 4, 64 * 4), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Evaluate without and with CFG 2, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--model", help="another folder of the same kind (default: the one that ships)")
    parser.add_argument("--sheet", help="also write a contact sheet of the CFG 2 images to this file")
    arguments = parser.parse_args()
    pipe = sampling.load()
    if arguments.model:
        pipe = FluxPipeline.from_pretrained(arguments.model)
        pipe.set_progress_bar_config(disable=True)
    judge, hold_out = train_judge()
    labels = np.arange(arguments.images) % 10
    rows = []
    for cfg in (1.0, 2.0):
        images = sample(pipe, arguments.images, cfg=cfg, steps=arguments.steps)
        accuracy = float((judge.predict(features(images)) == labels).mean())
        error = (accuracy * (1 - accuracy) / arguments.images) ** 0.5
        rows.append({"true CFG": cfg, "images": arguments.images, "accuracy": accuracy, "standard error": error})
    if arguments.sheet:
        sheet(images, arguments.sheet)
    notes = [
        f"{arguments.steps} steps, uncached, all digits over both photographs. The judge, a support vector machine trained on "
        f"real digits only, reads held-out real digits with accuracy {hold_out:.3f}.",
    ]
    print(table(rows))
    print(f"judge on held-out real digits: {hold_out:.3f}")
    if not arguments.model:
        print(write_result("mini_flux_accuracy", "What mini-FLUX draws", rows, notes=notes))


if __name__ == "__main__":
    main()
