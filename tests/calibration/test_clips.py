"""Video against a reference: what PSNR cannot tell apart, flicker does."""

import math

import numpy as np
import pytest

import afcache
from afcache import clip_quality

RANDOM = np.random.default_rng(0)
FRAMES = 9
# A bright square that moves over a still ground.
CLIP = np.full((FRAMES, 16, 24, 3), 0.4)
for _frame in range(FRAMES):
    CLIP[_frame, 4:9, 2 * _frame : 2 * _frame + 5] = 0.7


def noisy(*, is_steady: bool) -> np.ndarray:
    """The clip with noise of the same size: the same in all frames, or each frame's own."""
    noise = RANDOM.standard_normal((1 if is_steady else FRAMES, *CLIP.shape[1:])) * 0.02
    return CLIP + noise * (0.02 / np.sqrt(np.mean(noise**2)))


def test_noise_of_each_frame_flickers_and_noise_that_stays_does_not():
    steady, restless = (clip_quality(noisy(is_steady=each), CLIP) for each in (True, False))
    assert steady.psnr == pytest.approx(restless.psnr, abs=1e-6)
    assert steady.flicker < 1e-9 < restless.flicker
    assert restless.unsteadiness == pytest.approx(1, abs=0.05)
    assert steady.unsteadiness < 1e-9


def test_flicker_is_relative_to_what_moves():
    wrong = CLIP + 0.01 * (-1.0) ** np.arange(FRAMES)[:, None, None, None]
    quality = clip_quality(wrong, CLIP)
    moved = np.sqrt(np.sum(np.diff(CLIP, axis=0) ** 2))
    changed = 0.02 * np.sqrt((FRAMES - 1) * CLIP[0].size)
    assert quality.flicker == pytest.approx(changed / moved)
    # Errors that alternate differ by twice their size.
    assert quality.unsteadiness == pytest.approx(math.sqrt(2))


def test_a_clip_that_stands_still_is_all_flicker_and_one_that_moves_twice_as_far_too():
    assert clip_quality(np.broadcast_to(CLIP[:1], CLIP.shape), CLIP).flicker == pytest.approx(1)
    assert clip_quality(CLIP + (CLIP - CLIP[:1]), CLIP).flicker == pytest.approx(1)


def test_the_worst_frame_counts():
    wrong = CLIP.copy()
    wrong[3] += 0.1
    quality = clip_quality(wrong, CLIP)
    assert quality.worst_frame == quality.frames[3] == pytest.approx(20)
    assert quality.frames.count(math.inf) == FRAMES - 1
    assert quality.psnr == pytest.approx(20 + 10 * math.log10(FRAMES))
    assert 0 < quality.ssim < 1


def test_equal_clips_and_still_ones():
    assert clip_quality(CLIP, CLIP) == (math.inf, (math.inf,) * FRAMES, 1.0, 0.0, 0.0)
    still = np.broadcast_to(CLIP[:1], CLIP.shape)
    assert clip_quality(still, still).flicker == 0
    assert clip_quality(CLIP, still).flicker == math.inf


@pytest.mark.parametrize("frame", [0, 3])
def test_a_frame_that_is_not_finite_is_in_every_number(frame: int):
    broken = CLIP.copy()
    broken[frame] = math.nan
    for quality in (clip_quality(broken, noisy(is_steady=False)), clip_quality(noisy(is_steady=False), broken)):
        numbers = (quality.psnr, quality.worst_frame, quality.ssim, quality.flicker, quality.unsteadiness)
        assert all(map(math.isnan, numbers))


def test_bytes_are_pixels_too():
    first, second = (CLIP * 255).round().astype(np.uint8), (noisy(is_steady=False).clip(0, 1) * 255).round().astype(np.uint8)
    of_bytes, of_floats = clip_quality(second, first), clip_quality(second / 255, first / 255)
    assert of_bytes.psnr == pytest.approx(of_floats.psnr)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (CLIP[:4], r"clip has shape \(4, 16, 24, 3\), reference \(9, 16, 24, 3\); compare clips of one size and length\."),
        (CLIP[:, :8], "compare clips of one size and length"),
    ],
)
def test_clips_of_other_shapes_are_refused(clip: np.ndarray, message: str):
    with pytest.raises(ValueError, match=message):
        clip_quality(clip, CLIP)


@pytest.mark.parametrize("clip", [CLIP[0], CLIP[:1]])
def test_pictures_are_no_clips(clip: np.ndarray):
    with pytest.raises(ValueError, match=r"clip must be \[frames, height, width, 3\] with two frames or more"):
        afcache.clip_quality(clip, clip)
