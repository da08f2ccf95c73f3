"""Resizing by area."""

import numpy as np
import pytest

from longdream.envs.images import resize_area


def slow(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Reference: repeat every old pixel, then average whole blocks."""
    h, w = image.shape[:2]
    fine = image.repeat(height, 0).repeat(width, 1).astype(float)
    return fine.reshape(height, h, width, w, -1).mean((1, 3))


@pytest.mark.parametrize(
    ("old", "new"), [((6, 9), (3, 3)), ((7, 5), (3, 4)), ((4, 6), (8, 9)), ((5, 5), (5, 5)), ((3, 7), (1, 1))]
)
def test_each_pixel_is_the_mean_of_its_area(old: tuple[int, int], new: tuple[int, int]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, *old, 3)).astype(np.uint8)
    resized = resize_area(images, *new)
    assert resized.dtype == np.uint8 and resized.shape == (2, *new, 3)
    for image, small in zip(images, resized, strict=True):
        assert np.abs(small - slow(image, *new)).max() <= 0.51


def test_white_stays_white() -> None:
    assert (resize_area(np.full((360, 640, 3), 255, np.uint8), 64, 64) == 255).all()
