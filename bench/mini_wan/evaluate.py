"""Does mini-Wan draw what the prompt says? Digit and direction are judged apart, by judges that know real clips only.

    python -m bench.mini_wan.evaluate --clips 40
    python -m bench.mini_wan.evaluate --clips 40 --experts
    python -m bench.mini_wan.evaluate --device cuda --clips 160 --sheet frames.png --gif clips.gif

A digit is whiter than any background, which is darkened: what exceeds the background's brightest is the digit's mask. A
support vector machine reads the middle frame's mask, centred; the direction is where the mask's centroid goes from the
first frames to the last. Both judges' accuracy on clips of held-out real digits is printed beside the model's.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from PIL import Image
from sklearn.svm import SVC

from bench.mini_flux.data import load_split
from bench.mini_wan import data
from bench.mini_wan.parts import EXPERTS, WEIGHTS
from bench.record.recording import write_result
from bench.record.render import table

_COPIES = 3
_BATCH = 80
_ENDS = 3


def masks(clips: torch.Tensor) -> torch.Tensor:
    """The digit in `clips [batch, 3, frames, 32, 32]` in [-1, 1]: `[batch, frames, 32, 32]` in [0, 1]."""
    white = (clips.amin(dim=1) + 1) / 2
    return ((white - data.BACKGROUND_GAIN) / (1 - data.BACKGROUND_GAIN)).clamp(0, 1)


def centroids(mask: torch.Tensor) -> torch.Tensor:
    """Mean positions `[..., 2]` (x, y) in pixels of `mask [..., 32, 32]`; the middle where it is empty."""
    pixels = torch.arange(data.IMAGE_SIZE, device=mask.device, dtype=mask.dtype)
    middle = (data.IMAGE_SIZE - 1) / 2
    total = mask.sum((-2, -1)) + 1e-6
    x = (mask.sum(-2) * (pixels - middle)).sum(-1) / total
    y = (mask.sum(-1) * (pixels - middle)).sum(-1) / total
    return torch.stack((x, y), dim=-1) + middle


def motions(clips: torch.Tensor) -> torch.Tensor:
    """Pixels `[batch, 2]` (x, y) that the digit moves from the first three frames to the last three."""
    middle = centroids(masks(clips))
    return middle[:, -_ENDS:].mean(1) - middle[:, :_ENDS].mean(1)


def judge_ways(clips: torch.Tensor) -> np.ndarray:
    """Directions `[batch]` (index into `data.WAYS`) by the larger component of the motion."""
    x, y = motions(clips).cpu().unbind(1)
    horizontal = torch.where(x < 0, 0, 1)
    vertical = torch.where(y < 0, 2, 3)
    return torch.where(x.abs() > y.abs(), horizontal, vertical).numpy()


def features(clips: torch.Tensor) -> np.ndarray:
    """The middle frame's mask around its centroid, what the digit's judge looks at: `[batch, 20 * 20]`."""
    mask = masks(clips[:, :, clips.shape[2] // 2 :][:, :, :1])[:, 0].cpu()
    half = 10
    corners = centroids(mask).round().long()
    padded = torch.nn.functional.pad(mask, (half, half, half, half))
    inside = torch.arange(2 * half)
    rows, columns = corners[:, 1:] + inside, corners[:, :1] + inside
    return padded[torch.arange(len(mask))[:, None, None], rows[:, :, None], columns[:, None, :]].flatten(1).numpy()


def train_judge(*, copies: int = _COPIES) -> tuple[SVC, float, float]:
    """Fit the digits' judge on rendered training digits; return it with both judges' accuracy on held-out real digits."""
    digits, photographs = load_split(), data.stack_photographs()
    generator = torch.Generator().manual_seed(1)

    def rendered(images: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        ways = torch.randint(0, len(data.WAYS), (len(images),), generator=generator)
        places = torch.randint(0, 2, (len(images),), generator=generator)
        return data.render(images, ways, places, photographs, generator), ways.numpy()

    train = np.concatenate([features(rendered(digits.train_images)[0]) for _ in range(copies)])
    judge = SVC(C=10, gamma="scale").fit(train, np.tile(digits.train_labels.numpy(), copies))
    clips, ways = rendered(digits.test_images)
    digit_accuracy = float(judge.score(features(clips), digits.test_labels.numpy()))
    return judge, digit_accuracy, float((judge_ways(clips) == ways).mean())


def sample(pipe: Any, count: int, **settings: Any) -> torch.Tensor:
    """Clips `[count, 3, frames, 32, 32]` in [-1, 1] of seeds 0 to count - 1, in batches; noise comes from the CPU."""
    clips = []
    for start in range(0, count, _BATCH):
        seeds = range(start, min(start + _BATCH, count))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        prompts = [data.prompt_of(seed) for seed in seeds]
        output = pipe(prompts, generator=generators, output_type="pt", **settings)
        clips.append(output.frames.permute(0, 2, 1, 3, 4).cpu() * 2 - 1)
    return torch.cat(clips)


def _pictures(clips: torch.Tensor) -> np.ndarray:
    """Bytes `[batch, frames, height, width, 3]`."""
    return ((clips + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def sheet(clips: torch.Tensor, path: str, *, rows: int = 10, enlarge: int = 3) -> None:
    """Write every other frame of the first clips, one clip a row."""
    strips = [np.concatenate(list(clip), axis=1) for clip in _pictures(clips[:rows, :, ::2])]
    picture = Image.fromarray(np.concatenate(strips))
    picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST).save(path)


def gif(clips: torch.Tensor, path: str, *, columns: int = 10, enlarge: int = 3) -> None:
    """Write the clips side by side as a moving picture, eight frames a second; whole rows only."""
    columns = min(columns, len(clips))
    pictures = _pictures(clips[: len(clips) // columns * columns])
    rows = pictures.reshape(-1, columns, *pictures.shape[1:])
    frames = rows.transpose(2, 0, 3, 1, 4, 5).reshape(rows.shape[2], rows.shape[0] * 32, columns * 32, 3)
    size = (frames.shape[2] * enlarge, frames.shape[1] * enlarge)
    images = [Image.fromarray(frame).resize(size, Image.Resampling.NEAREST) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=125, loop=0)


def main() -> None:
    """Evaluate with each guidance scale, and write bench/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", action="store_true", help="the model of two experts")
    parser.add_argument("--model", type=Path, help="another folder of the same kind; writes no result")
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument("--steps", type=int, help="default: the recommended number")
    parser.add_argument("--guidance", type=float, nargs="*", help="scales to try (default: 1 and the recommended one)")
    parser.add_argument("--shift", type=float, help="another flow shift for the scheduler; writes no result")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", help="write frames of the last scale's first clips to this file")
    parser.add_argument("--gif", help="write the last scale's first clips to this file, moving")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model or (EXPERTS if args.experts else WEIGHTS)
    settings = json.loads((folder / "recommended.json").read_text())
    scales = args.guidance or [1.0, settings["guidance_scale"]]
    settings["num_inference_steps"] = args.steps or settings["num_inference_steps"]
    pipe = WanPipeline.from_pretrained(folder).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.shift:
        pipe.scheduler.register_to_config(flow_shift=args.shift)
    judge, digit_limit, way_limit = train_judge()
    classes = np.array([data.class_of(seed) for seed in range(args.clips)])
    rows = []
    clips = torch.empty(0)
    for scale in scales:
        clips = sample(pipe, args.clips, **{**settings, "guidance_scale": scale})
        right = judge.predict(features(clips)) == classes[:, 0], judge_ways(clips) == classes[:, 1]
        moved = float(motions(clips).abs().amax(1).mean())
        accuracies = {"digit": right[0].mean(), "direction": right[1].mean(), "both": (right[0] & right[1]).mean()}
        error = float((accuracies["digit"] * (1 - accuracies["digit"]) / args.clips) ** 0.5)
        shares = {name: float(share) for name, share in accuracies.items()}
        rows.append({"guidance": scale, "clips": args.clips, **shares, "standard error (digit)": error, "pixels moved": moved})
    print(table(rows))
    print(f"judges on clips of held-out real digits: digit {digit_limit:.3f}, direction {way_limit:.3f}")
    notes = [
        f"{settings['num_inference_steps']} steps, uncached, classes in turn. The judges have seen real clips only, and read "
        f"those of held-out digits with accuracy {digit_limit:.3f} (digit) and {way_limit:.3f} (direction).",
    ]
    if not (args.model or args.shift):
        subject, what = ("mini_wan_experts", "mini-Wan of two experts") if args.experts else ("mini_wan", "mini-Wan")
        print(write_result(f"{subject}_accuracy", f"What {what} draws", rows, notes=notes, device=args.device))
    if args.sheet:
        sheet(clips, args.sheet)
    if args.gif:
        gif(clips[:40], args.gif)


if __name__ == "__main__":
    main()
