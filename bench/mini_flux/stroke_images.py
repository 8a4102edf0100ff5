"""Images and prompts of "strokes": handwritten digits as coloured strokes on plain paper, no photographs.

The digits are scikit-learn's, split as mini-FLUX's.

Axes: batch, 3 (RGB), height = width = 32 pixels, values in [-1, 1].
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from bench.mini_flux import data

IMAGE_SIZE = 32
COLOR_NAMES = ("red", "green", "blue", "yellow")
PAPER_NAMES = ("dark", "light")
TEMPLATES = (
    "a {color} handwritten {digit} on {paper} paper",
    "{color} handwritten {digit} on {paper} paper",
    "a handwritten {digit} in {color} on {paper} paper",
    "the digit {digit} in {color} ink on {paper} paper",
    "a {digit} drawn in {color} on a {paper} sheet",
    "the number {digit}, {color} on {paper}",
    "{digit} {color} {paper}",
)
_COLORS = ((0.85, 0.12, 0.12), (0.1, 0.6, 0.2), (0.15, 0.3, 0.9), (0.95, 0.75, 0.05))
_PAPERS = (0.1, 0.92)
_COLOR_JITTER, _PAPER_JITTER = 0.08, 0.04
_MAX_ANGLE = math.radians(12)
_SCALES = (0.75, 1.0)
_MAX_SHIFT = 0.12
# The pen's edge: alpha falls from 1 to 0 between these values of the enlarged digit.
_EDGE = (0.2, 0.7)


def render(digits: torch.Tensor, colors: torch.Tensor, papers: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw digits as strokes, slightly turned, scaled and moved.

    Args:
        digits: `[batch, 1, 8, 8]` in [0, 1].
        colors: int64 `[batch]`, index into `COLOR_NAMES`.
        papers: int64 `[batch]`, index into `PAPER_NAMES`.
        generator: draws the jitter, on the digits' device.

    Returns:
        float32 `[batch, 3, 32, 32]` in [-1, 1].

    """
    batch, device = len(digits), digits.device

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=generator, device=device)

    angles, scales = uniform(-_MAX_ANGLE, _MAX_ANGLE), uniform(*_SCALES)
    shifts = uniform(-_MAX_SHIFT, _MAX_SHIFT, 2)
    cosine, sine = angles.cos() / scales, angles.sin() / scales
    rows = (torch.stack([cosine, -sine, shifts[:, 0]], 1), torch.stack([sine, cosine, shifts[:, 1]], 1))
    grid = F.affine_grid(torch.stack(rows, 1), [batch, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    large = F.interpolate(digits, size=(2 * IMAGE_SIZE,) * 2, mode="bicubic", align_corners=False).clamp(0, 1)
    alpha = F.grid_sample(large, grid, align_corners=False)
    alpha = ((alpha - _EDGE[0]) / (_EDGE[1] - _EDGE[0])).clamp(0, 1)
    ink = torch.tensor(_COLORS, device=device)[colors] + uniform(-_COLOR_JITTER, _COLOR_JITTER, 3)
    sheet = torch.tensor(_PAPERS, device=device)[papers][:, None] + uniform(-_PAPER_JITTER, _PAPER_JITTER, 3)
    ink, sheet = ink.clamp(0, 1)[:, :, None, None], sheet.clamp(0, 1)[:, :, None, None]
    return (sheet * (1 - alpha) + ink * alpha) * 2 - 1


def prompts_for(digit: int, color: int, paper: int) -> list[str]:
    """List every wording of one digit (0 to 9) in one colour (0 to 3) on one paper (0 or 1)."""
    return [
        template.format(digit=name, color=COLOR_NAMES[color], paper=PAPER_NAMES[paper])
        for template in TEMPLATES
        for name in (data.DIGIT_NAMES[digit], str(digit))
    ]


def values_of(seed: int) -> tuple[int, int, int]:
    """Digit, colour and paper: ten seeds in turn show all digits, colours and papers, eighty show every class."""
    digit, rest = seed % 10, seed // 10
    return digit, (digit + rest) % 4, (digit // 3 + rest + rest // 4) % 2


def features(images: torch.Tensor) -> np.ndarray:
    """What the judge looks at: distance from the paper's colour, which the border shows, `[count, 16 * 16]` in [0, 1]."""
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], dim=2)
    distance = (images - border.median(dim=2).values[:, :, None, None]).norm(dim=1, keepdim=True)
    distance = distance / distance.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-3)
    return F.avg_pool2d(distance, 2).flatten(1).cpu().numpy()


class Source:
    """Endless random images of the training digits, drawn on one device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        split = data.load_split()
        self._train = split.train_images.to(device), split.train_labels.to(device)
        self._test = split.test_images.to(device), split.test_labels.to(device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(images [count, 3, 32, 32], classes [count])`; the generator is on the source's device."""
        digits, labels = self._train
        picks = torch.randint(0, len(labels), (count,), generator=generator, device=labels.device)
        return self._render(digits[picks], labels[picks], generator)

    def examples(self, generator: torch.Generator, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Every training (or held-out) digit once, in random colours, with the digits' labels."""
        digits, labels = self._test if held_out else self._train
        return self._render(digits, labels, generator)[0], labels

    def _render(
        self, digits: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        colors, papers = (
            torch.randint(0, count, labels.shape, generator=generator, device=labels.device)
            for count in (len(COLOR_NAMES), len(PAPER_NAMES))
        )
        return render(digits, colors, papers, generator), (labels * len(COLOR_NAMES) + colors) * len(PAPER_NAMES) + papers
