"""Images and prompts of "textures": small crops of ten pictures, near and far.

The pictures come inside scikit-image's wheel, so nothing is downloaded; all are CC0, in the public domain or without known
restrictions (textures/ATTRIBUTION.md). Their right quarter is held out: neither generator nor judge is trained on it.

Axes: batch, 3 (RGB), height = width = 48 pixels, values in [-1, 1].
"""

from pathlib import Path

import numpy as np
import skimage
import torch
import torch.nn.functional as F
from PIL import Image

IMAGE_SIZE = 48
# File, words for it, and by how much it is reduced before the near view is cut from it.
PICTURES = (
    ("brick.png", ("brick", "a wall"), 1),
    ("grass.png", ("grass", "a lawn"), 1),
    ("gravel.png", ("gravel", "stones"), 1),
    ("coffee.png", ("coffee", "a cup"), 1),
    ("chelsea.png", ("a cat", "fur"), 1),
    ("rocket.jpg", ("a rocket", "dusk"), 1),
    ("hubble_deep_field.jpg", ("galaxies", "stars"), 2),
    ("coins.png", ("coins", "money"), 1),
    ("ihc.png", ("tissue", "stained cells"), 1),
    ("retina.jpg", ("a retina", "an eye"), 2),
)
VIEWS = (("close-up", "near view"), ("wide view", "far view"))
TEMPLATES = (
    "a {view} of {subject}",
    "{view} of {subject}",
    "a picture of {subject}, {view}",
    "the {view} of {subject}",
    "{subject} in a {view}",
    "{subject}, {view}",
)
_TRAINED_PART = 0.75
# What lies outside the retina is black.
_RETINA_SIDE = 980
_EXAMPLES = 500


def load_pictures() -> list[torch.Tensor]:
    """The pictures as they are cropped near: float32 `[3, height, width]` in [0, 1], 300 to 600 pixels a side."""
    folder = Path(skimage.__file__).parent / "data"
    pictures = []
    for name, _, reduction in PICTURES:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"))
        picture = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
        if name == "retina.jpg":
            start = (picture.shape[1] - _RETINA_SIDE) // 2
            picture = picture[:, start : start + _RETINA_SIDE, start : start + _RETINA_SIDE]
        pictures.append(_reduced(picture, reduction))
    return pictures


def _reduced(picture: torch.Tensor, by: int) -> torch.Tensor:
    return F.avg_pool2d(picture[None], by)[0]


def prompts_for(subject: int, view: int) -> list[str]:
    """List every wording of one picture (0 to 9), near (0) or far (1)."""
    return [
        template.format(subject=subject_name, view=view_name)
        for template in TEMPLATES
        for subject_name in PICTURES[subject][1]
        for view_name in VIEWS[view]
    ]


def values_of(seed: int) -> tuple[int, int]:
    """Picture and view: ten seeds in turn show all pictures, half of them near; twenty show every class."""
    subject = seed % 10
    return subject, (subject + seed // 10) % 2


def features(images: torch.Tensor) -> np.ndarray:
    """What the judge looks at: coarse colours, their spread, and histograms of brightness and of edges, `[count, 84]`."""
    images = images.clamp(-1, 1).cpu()
    coarse = F.avg_pool2d(images, 12).flatten(1)
    spread = images.flatten(2).std(dim=2)
    gray = images.mean(dim=1)
    across, down = gray.diff(dim=2)[:, 1:], gray.diff(dim=1)[:, :, 1:]
    edges = (across.square() + down.square()).sqrt()
    far = F.avg_pool2d(gray[:, None], 4)[:, 0]
    histograms = [_histogram(gray, -1, 1), _histogram(edges, 0, 0.8), _histogram(far.diff(dim=2).abs(), 0, 0.8)]
    balance = [across.abs().mean(dim=(1, 2))[:, None], down.abs().mean(dim=(1, 2))[:, None]]
    return torch.cat([coarse, spread, *histograms, *balance], dim=1).numpy()


def _histogram(values: torch.Tensor, low: float, high: float, *, bins: int = 10) -> torch.Tensor:
    index = ((values.flatten(1) - low) / (high - low) * bins).long().clamp(0, bins - 1)
    return F.one_hot(index, bins).float().mean(dim=1)


class Source:
    """Endless random crops of the trained part of the pictures, cut on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        levels = [level for picture in load_pictures() for level in (picture, _reduced(picture, 2))]
        sizes = [level.shape[1:] for level in levels]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        padded = [F.pad(level, (0, width - level.shape[2], 0, height - level.shape[1])) for level in levels]
        # `[classes, height, width, 3]`: picture by picture, near and far.
        self._canvas = torch.stack(padded).permute(0, 2, 3, 1).contiguous().to(device)
        self._heights = torch.tensor([size[0] for size in sizes], device=device)
        self._widths = torch.tensor([size[1] for size in sizes], device=device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(images [count, 3, 48, 48], classes [count])`; the generator is on the source's device."""
        return self._draw(count, generator, held_out=False)

    def examples(self, generator: torch.Generator, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Random crops of the trained (or the held-out) part, with the pictures' indices."""
        images, classes = self._draw(_EXAMPLES, generator, held_out=held_out)
        return images, classes // len(VIEWS)

    def _draw(self, count: int, generator: torch.Generator, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._canvas.device
        classes = torch.randint(0, len(self._canvas), (count,), generator=generator, device=device)
        border = (self._widths[classes] * _TRAINED_PART).long()
        first = border if held_out else torch.zeros_like(border)
        last = (self._widths[classes] if held_out else border) - IMAGE_SIZE
        down, across = torch.rand(2, count, generator=generator, device=device)
        tops = (down * (self._heights[classes] - IMAGE_SIZE + 1)).long()
        lefts = first + (across * (last - first + 1)).long()
        offsets = torch.arange(IMAGE_SIZE, device=device)
        rows, columns = tops[:, None] + offsets, lefts[:, None] + offsets
        crops = self._canvas[classes[:, None, None], rows[:, :, None], columns[:, None, :]]
        return crops.permute(0, 3, 1, 2).contiguous() * 2 - 1, classes
