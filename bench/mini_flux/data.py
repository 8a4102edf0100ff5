"""Images and prompts for mini-FLUX: handwritten digits over crops of two photographs.

Both sources come inside scikit-learn, so nothing is downloaded: `load_digits` (UCI Optical Recognition of Handwritten
Digits, 1797 pictures of 8 x 8) and `load_sample_images` (china.jpg and flower.jpg, CC BY 2.0).

Axes: batch, 3 (RGB), height = width = 32 pixels, values in [-1, 1].
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

IMAGE_SIZE = 32
DIGIT_SIZE = 28
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Index 0 is china.jpg (the roofs of a palace), index 1 is flower.jpg (a dahlia).
PLACE_NAMES = (("palace", "temple"), ("flower", "dahlia"))
TEMPLATES = (
    "a handwritten {digit} on a {place}",
    "handwritten {digit} on a {place}",
    "a {digit} on a {place}",
    "the digit {digit} over a {place}",
    "a white handwritten {digit} in front of a {place}",
    "the number {digit} on a {place}",
    "{digit} on {place}",
)
_MARGIN = IMAGE_SIZE - DIGIT_SIZE
_BACKGROUND_GAIN = 0.65
_PIXEL_MAX = 16.0


@dataclass(frozen=True)
class Digits:
    """The real digits, split once: `train` is seen by generator and judge, `test` by neither.

    Attributes:
        train_images, test_images: float32 `[count, 1, 8, 8]` in [0, 1].
        train_labels, test_labels: int64 `[count]`, 0 to 9.

    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load_split(*, seed: int = 0) -> Digits:
    """Load scikit-learn's digits, 75 % for training, stratified by class."""
    images: Any
    labels: Any
    images, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.25, random_state=seed, stratify=labels)

    def as_images(flat: Any) -> torch.Tensor:
        return torch.from_numpy(flat.astype(np.float32) / _PIXEL_MAX).reshape(-1, 1, 8, 8)

    return Digits(as_images(train_x), torch.from_numpy(train_y), as_images(test_x), torch.from_numpy(test_y))


def load_photographs() -> list[torch.Tensor]:
    """Load the two photographs at half size: float32 `[3, height, width]` in [0, 1]."""
    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in load_sample_images().images]
    return [F.interpolate(photo[None], scale_factor=0.5, mode="area")[0] for photo in photographs]


def render(
    digits: torch.Tensor, places: torch.Tensor, photographs: list[torch.Tensor], generator: torch.Generator
) -> torch.Tensor:
    """Composite white digits over random crops.

    Args:
        digits: `[batch, 1, 8, 8]` in [0, 1].
        places: int64 `[batch]`, index into `photographs`.
        photographs: from `load_photographs`.
        generator: draws shifts and crops.

    Returns:
        float32 `[batch, 3, 32, 32]` in [-1, 1].

    """
    batch = digits.shape[0]
    size = (DIGIT_SIZE, DIGIT_SIZE)
    alpha = F.interpolate(digits, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
    # Every digit is placed at random inside its margin, so none is cut.
    shifts = torch.randint(0, _MARGIN + 1, (batch, 2), generator=generator).tolist()
    alpha = torch.stack([F.pad(a, (x, _MARGIN - x, y, _MARGIN - y)) for a, (x, y) in zip(alpha, shifts, strict=True)])
    crops = []
    for place in places.tolist():
        _, height, width = photographs[place].shape
        top = int(torch.randint(0, height - IMAGE_SIZE, (), generator=generator))
        left = int(torch.randint(0, width - IMAGE_SIZE, (), generator=generator))
        crops.append(photographs[place][:, top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])
    background = torch.stack(crops) * _BACKGROUND_GAIN
    return (background * (1 - alpha) + alpha) * 2 - 1


def prompts_for(digit: int, place: int) -> list[str]:
    """List every wording the model is trained on for one digit (0 to 9) over one photograph (0 or 1)."""
    return [
        template.format(digit=name, place=place_name)
        for template in TEMPLATES
        for name in (DIGIT_NAMES[digit], str(digit))
        for place_name in PLACE_NAMES[place]
    ]


def values_of(seed: int) -> tuple[int, int]:
    """Digit and place in turn, so that any 20 consecutive seeds show all of them."""
    return seed % 10, (seed // 10) % 2


def features(images: torch.Tensor) -> np.ndarray:
    """What the judge looks at: brightness, the darkest colour channel, `[count, 32 * 32]`."""
    return images.min(dim=1).values.flatten(1).cpu().numpy()


class Source:
    """Endless random images of the training digits, on the CPU whatever the device, since they are composited one by one."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        del device
        self.device = torch.device("cpu")
        self._digits, self._photographs = load_split(), load_photographs()

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(images [count, 3, 32, 32], classes [count])`."""
        picks = torch.randint(0, len(self._digits.train_labels), (count,), generator=generator)
        places = torch.randint(0, 2, (count,), generator=generator)
        images = render(self._digits.train_images[picks], places, self._photographs, generator)
        return images, self._digits.train_labels[picks] * 2 + places

    def examples(self, generator: torch.Generator, *, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Every training (or held-out) digit once, over random places, with the digits' labels."""
        digits = self._digits
        images, labels = (digits.test_images, digits.test_labels) if held_out else (digits.train_images, digits.train_labels)
        places = torch.randint(0, 2, (len(images),), generator=generator)
        return render(images, places, self._photographs, generator), labels
