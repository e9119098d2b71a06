"""Pairs that tell their own labels or coordinates, so that each rendered view can be checked by itself."""

import cv2
import numpy as np

from data.augment import AugmentConfig, View, draw_view
from data.render import render

IGNORE = 255
IDENTITY = np.arange(256, dtype=np.uint8)
STILL = AugmentConfig(scale=(1, 1), rotate_probability=0, flip_probability=0, photometric=False, max_class_share=1)
TURNING = STILL.model_copy(update={"rotate_probability": 1.0})
SIZE = (64, 48)


def changed(config: AugmentConfig, **keys) -> AugmentConfig:
    return AugmentConfig(**{**config.model_dump(), **keys})


def pixels(image, label, view: View, table=IDENTITY, stale=77):
    """The view in buffers that hold something else before."""
    out_image, out_label = np.full((*view.size, 3), stale, np.uint8), np.full(view.size, stale, np.uint8)
    assert render(image, label, view, table, IGNORE, out_image, out_label) is None
    return out_image, out_label


def draw(image, label, config, seed=0, size=SIZE, **options):
    return pixels(image, label, draw_view(label, size, config, np.random.default_rng(seed)), **options)


def blob(height, width):
    """A tilted ellipse, white and of class 1, on black of class 0; drawn fine, so that its edge has no bias."""
    label = np.zeros((height * 8, width * 8), np.uint8)
    centre, axes = (round(width * 3.6), round(height * 4.4)), (width * 2, height * 3)
    cv2.ellipse(label, centre, axes, 20, 0, 360, 1, -1)
    share = cv2.resize(label.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return np.dstack([np.round(share * 255).astype(np.uint8)] * 3), (share >= 0.5).astype(np.uint8)


def mapped(height=100, width=80):
    """Red and green tell a pixel's x and y; the labels are three uneven bands."""
    y, x = np.mgrid[:height, :width] + 0.5
    image = np.round(np.dstack([20 + 2 * x, 20 + 2 * y, np.full_like(x, 99)])).astype(np.uint8)
    return image, np.digitize(x + y / 2, [30, 80]).astype(np.uint8)
