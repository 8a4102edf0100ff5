"""What a pipeline drew, and writing it: pictures as PNG; videos as GIF, as MP4 where that can be, and as a strip of frames."""

import importlib.util
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# Of everything that is written under one name.
ENDINGS = (".png", ".gif", ".mp4", ".wav", "_frames.png")
_MOST_FRAMES = 8


class Drawn(NamedTuple):
    """What one call of a pipeline drew.

    Attributes:
        pixels: `[height, width, 3]` of a picture, `[frames, height, width, 3]` of a video, in [0, 1].
        rate: frames per second.
        audio: `[samples, channels]` in [-1, 1], or None.
        audio_rate: samples per second.

    """

    pixels: np.ndarray
    rate: float = 1.0
    audio: np.ndarray | None = None
    audio_rate: int = 0

    @property
    def is_video(self) -> bool:
        """Whether there are several frames, or might be."""
        return self.pixels.ndim == 4

    @property
    def frames(self) -> np.ndarray:
        """`[frames, height, width, 3]`: of a picture one."""
        return self.pixels if self.is_video else self.pixels[None]

    @property
    def file(self) -> str:
        """The ending of the file that shows it best."""
        return ".gif" if self.is_video else ".png"


def save(stem: Path, drawn: Drawn) -> None:
    """Write all files of what was drawn.

    Args:
        stem: folder, and name without ending.
        drawn: picture or video.

    """
    if not drawn.is_video:
        as_image(drawn.pixels).save(f"{stem}.png")
        return
    save_film(Path(f"{stem}.gif"), drawn.pixels, drawn.rate)
    as_image(strip(drawn.pixels)).save(f"{stem}_frames.png")
    if has_encoder():
        from diffusers.utils import export_to_video

        export_to_video(list(drawn.pixels), f"{stem}.mp4", fps=round(drawn.rate))
    if drawn.audio is not None:
        _save_sound(f"{stem}.wav", drawn.audio, drawn.audio_rate)


def clear(stem: Path) -> None:
    """Remove what an earlier run has left under a name: files of one name belong together."""
    for ending in (*ENDINGS, *(f"_uncached{ending}" for ending in ENDINGS), ".json", "_report.png"):
        Path(f"{stem}{ending}").unlink(missing_ok=True)


def has_encoder() -> bool:
    """Whether MP4 files can be written here."""
    return all(importlib.util.find_spec(name) is not None for name in ("imageio", "imageio_ffmpeg"))


def save_film(path: Path, frames: np.ndarray, rate: float) -> None:
    """Write frames `[frames, height, width, 3]`, in [0, 1], as a GIF that goes round; its clock counts in 10 ms."""
    first, *others = [as_image(frame) for frame in frames]
    first.save(path, save_all=True, append_images=others, duration=max(round(100 / rate), 1) * 10, loop=0)


def strip(frames: np.ndarray) -> np.ndarray:
    """Up to eight frames from left to right, the first and the last among them: `[height, width, 3]`."""
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int)
    return beside(*frames[chosen])


def beside(*panels: np.ndarray) -> np.ndarray:
    """Pictures, or videos, `[..., height, width, 3]`, from left to right with white between them."""
    gap = np.ones_like(panels[0][..., : max(panels[0].shape[-2] // 40, 1), :])
    parts = [part for panel in panels for part in (gap, panel)]
    return np.concatenate(parts[1:], axis=-2)


def as_image(pixels: np.ndarray) -> Image.Image:
    """Float pixels `[height, width, 3]` in [0, 1] as a picture."""
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def _save_sound(path: str, audio: np.ndarray, rate: int) -> None:
    """16 bits a sample."""
    with wave.open(path, "wb") as file:
        file.setnchannels(audio.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(audio, -1, 1) * 32767).round().astype("<i2").tobytes())
