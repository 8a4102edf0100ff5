"""Clips and prompts for mini-Wan: handwritten digits that move over slowly panning crops of two photographs.

Both sources come inside scikit-learn and are read as mini-FLUX reads them (`bench.mini_flux.data`).

Axes: batch, 3 (RGB), 17 frames, height = width = 32 pixels, values in [-1, 1]. Positions grow to the right and downwards.
"""

import math

import torch
import torch.nn.functional as F

from bench.mini_flux.data import DIGIT_NAMES, PLACE_NAMES, load_photographs, load_split

FRAMES = 17
IMAGE_SIZE = 32
DIGIT_SIZE = 18
WAYS = ("left", "right", "up", "down")
CLASSES = len(DIGIT_NAMES) * len(WAYS) * len(PLACE_NAMES)
BACKGROUND_GAIN = 0.65
TEMPLATES = (
    "a handwritten {digit} moves {way} over a {place}",
    "handwritten {digit} moving {way} over a {place}",
    "a {digit} moves {way} over a {place}",
    "the digit {digit} slides {way} over a {place}",
    "a white handwritten {digit} drifts {way} in front of a {place}",
    "the number {digit} goes {way} over a {place}",
    "{digit} {way} over {place}",
)
_MARGIN = IMAGE_SIZE - DIGIT_SIZE
# Pixels that a digit travels in one clip, and that the background does.
_TRAVEL = (10.0, 13.0)
_PAN = (1.0, 5.0)
# The crop that a clip pans over: the picture, the pan, and two pixels on each side for bicubic sampling.
_CROP = IMAGE_SIZE + 10


def prompts_for(digit: int, way: int, place: int) -> list[str]:
    """List every wording the model is trained on for one digit (0 to 9), direction (0 to 3) and photograph (0 or 1)."""
    return [
        template.format(digit=name, way=WAYS[way], place=place_name)
        for template in TEMPLATES
        for name in (DIGIT_NAMES[digit], str(digit))
        for place_name in PLACE_NAMES[place]
    ]


def prompt(digit: int, way: int, place: int) -> str:
    """The wording used by every benchmark: "a handwritten seven moves left over a flower"."""
    return prompts_for(digit, way, place)[0]


def class_of(seed: int) -> tuple[int, int, int]:
    """`(digit, direction, place)` of a seed; any 80 consecutive seeds are all 80 classes, any 8 all motions and places."""
    motion = (seed + seed // 10) % 8
    return seed % 10, motion % 4, motion // 4


def prompt_of(seed: int) -> str:
    """The benchmarks' prompt of a seed."""
    return prompt(*class_of(seed))


def stack_photographs() -> torch.Tensor:
    """Both photographs at half size: float32 `[2, 3, height, width]` in [0, 1]."""
    return torch.stack(load_photographs())


def _sample(images: torch.Tensor, x: torch.Tensor, y: torch.Tensor, *, mode: str) -> torch.Tensor:
    """Windows of 32 x 32 pixels of `images [batch, channels, h, w]` whose corners are `x, y [batch, frames]`, sub-pixel.

    Returns `[batch, channels, frames, 32, 32]`, zero outside of the images.
    """
    height, width = images.shape[-2:]
    pixels = torch.arange(IMAGE_SIZE, device=images.device)
    columns = (x[..., None] + pixels)[:, :, None, :].expand(-1, -1, IMAGE_SIZE, -1)
    rows = (y[..., None] + pixels)[:, :, :, None].expand(-1, -1, -1, IMAGE_SIZE)
    grid = torch.stack((2 * columns / (width - 1) - 1, 2 * rows / (height - 1) - 1), dim=-1)
    windows = F.grid_sample(images, grid.flatten(1, 2), mode=mode, padding_mode="zeros", align_corners=True)
    return windows.unflatten(2, (x.shape[1], IMAGE_SIZE))


def _paths(ways: torch.Tensor, generator: torch.Generator, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Corners `x, y [batch, frames]` of digits, all inside [0, margin]; the speed is positive and eases at random."""

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(len(ways), 1, generator=generator, device=ways.device)

    time = torch.linspace(0, 1, frames, device=ways.device)
    progress = time + uniform(-0.5, 0.5) * torch.sin(2 * math.pi * time) / (2 * math.pi)
    progress = torch.where((ways % 2 == 0)[:, None], 1 - progress, progress)
    travel = uniform(*_TRAVEL)
    along = uniform(0, 1) * (_MARGIN - travel) + travel * progress
    across = (uniform(0, 1) * _MARGIN).expand_as(along)
    horizontal = (ways < 2)[:, None]
    return torch.where(horizontal, along, across), torch.where(horizontal, across, along)


def _backgrounds(places: torch.Tensor, photographs: torch.Tensor, generator: torch.Generator, frames: int) -> torch.Tensor:
    """Crops `[batch, 3, frames, 32, 32]` in [0, 1] that pan slowly, in any direction."""
    batch, device = len(places), places.device
    _, _, height, width = photographs.shape
    top = torch.randint(0, height - _CROP + 1, (batch, 1), generator=generator, device=device)
    left = torch.randint(0, width - _CROP + 1, (batch, 1), generator=generator, device=device)
    inside = torch.arange(_CROP, device=device)
    # The sliced axis between the indices comes last.
    crops = photographs[places[:, None, None], :, (top + inside)[:, :, None], (left + inside)[:, None, :]].permute(0, 3, 1, 2)
    turn, amount = torch.rand(2, batch, 1, generator=generator, device=device)
    pan = (_PAN[0] + (_PAN[1] - _PAN[0]) * amount) * torch.linspace(-0.5, 0.5, frames, device=device)
    middle = (_CROP - IMAGE_SIZE) / 2
    x, y = middle + pan * torch.cos(2 * math.pi * turn), middle + pan * torch.sin(2 * math.pi * turn)
    return _sample(crops, x, y, mode="bicubic").clamp(0, 1)


def render(
    digits: torch.Tensor,
    ways: torch.Tensor,
    places: torch.Tensor,
    photographs: torch.Tensor,
    generator: torch.Generator,
    *,
    frames: int = FRAMES,
) -> torch.Tensor:
    """Composite moving white digits over panning crops, all on one device.

    Args:
        digits: `[batch, 1, 8, 8]` in [0, 1].
        ways: int64 `[batch]`, index into `WAYS`.
        places: int64 `[batch]`, index into `photographs`.
        photographs: from `stack_photographs`.
        generator: draws paths, crops and pans.
        frames: of each clip; fewer frames move as far, so faster.

    Returns:
        float32 `[batch, 3, frames, 32, 32]` in [-1, 1].

    """
    size = (DIGIT_SIZE, DIGIT_SIZE)
    alpha = F.interpolate(digits, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    x, y = _paths(ways, generator, frames)
    alpha = _sample(alpha, -x, -y, mode="bilinear")
    background = _backgrounds(places, photographs, generator, frames) * BACKGROUND_GAIN
    return (background * (1 - alpha) + alpha) * 2 - 1


class Clips:
    """Endless random training clips, one fixed seed, on one device."""

    def __init__(self, seed: int, device: str | torch.device = "cpu") -> None:
        digits = load_split()
        self.images, self.labels = digits.train_images.to(device), digits.train_labels.to(device)
        self.photographs = stack_photographs().to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(clips [count, 3, 17, 32, 32], classes [count, 3]: digit, direction, place)`."""

        def pick(high: int) -> torch.Tensor:
            return torch.randint(0, high, (count,), generator=self.generator, device=self.labels.device)

        picks, ways, places = pick(len(self.labels)), pick(len(WAYS)), pick(len(PLACE_NAMES))
        clips = render(self.images[picks], ways, places, self.photographs, self.generator)
        return clips, torch.stack((self.labels[picks], ways, places), dim=1)
