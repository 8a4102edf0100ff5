import math

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from afcache.calibration.metrics import psnr, ssim


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_psnr_of_unrelated_images_is_under_12_db():
    # In uint8 arithmetic the differences would wrap, and the same images would score about 28 dB.
    assert psnr(noise(0), noise(1)) < 12
    wrapped = float(np.mean((noise(0) - noise(1)) ** 2))
    assert -10 * math.log10(wrapped / 255**2) > 25


def test_psnr_by_hand():
    image = np.zeros((4, 4, 3))
    assert psnr(image + 0.1, image) == pytest.approx(20.0)
    assert psnr(image, image) == math.inf


def test_psnr_of_bytes_and_floats_agree():
    assert psnr(noise(0), noise(1)) == pytest.approx(psnr(noise(0) / 255, noise(1) / 255))


def test_psnr_refuses_different_shapes():
    with pytest.raises(ValueError, match=r"image has shape \(4, 4, 3\), reference \(8, 4, 3\)"):
        psnr(np.zeros((4, 4, 3)), np.zeros((8, 4, 3)))


def test_ssim_is_one_for_equal_and_small_for_unrelated_images():
    assert ssim(noise(0), noise(0)) == pytest.approx(1.0)
    assert abs(ssim(noise(0), noise(1))) < 0.1


def test_ssim_is_scikit_images():
    image, reference = noise(0), (noise(0).astype(int) + noise(1)) // 2
    reference = reference.astype(np.uint8)
    expected = structural_similarity(image, reference, channel_axis=-1, data_range=255)
    assert ssim(image, reference) == pytest.approx(float(expected), abs=1e-9)  # pyright: ignore[reportArgumentType]


def test_ssim_of_small_pictures_looks_at_what_they_hold():
    image, reference = noise(0)[:6, :9], noise(1)[:6, :9]
    expected = structural_similarity(image, reference, channel_axis=-1, data_range=255, win_size=5)
    assert ssim(image, reference) == pytest.approx(float(expected), abs=1e-9)  # pyright: ignore[reportArgumentType]
    assert ssim(image, image) == pytest.approx(1.0)
    assert -1 <= ssim(image[:3], reference[:3]) <= 1


def test_ssim_refuses_pictures_without_structure_and_of_two_sizes():
    with pytest.raises(ValueError, match=r"image must be 3 pixels or more on each side to have structure, got \(2, 32, 3\)"):
        ssim(noise(0)[:2], noise(1)[:2])
    with pytest.raises(ValueError, match=r"image has shape \(32, 32, 3\), reference \(16, 32, 3\)"):
        ssim(noise(0), noise(1)[:16])
