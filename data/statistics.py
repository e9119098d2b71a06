"""What the pixel counts of a data set say about training on it."""

import numpy as np

BALANCE_POWER = 0.35
WEIGHT_RANGE = (0.1, 10.0)
ROWS_AT_A_TIME = 1 << 16


def balanced_weights(pixel_counts: np.ndarray) -> np.ndarray:
    """Class weights float64 (classes,) from pixels int64 (classes,): frequency^-0.35, with mean 1 over the classes that
    occur; 1 for the others. Plain cross-entropy learns eyes and lips many times later."""
    present = pixel_counts > 0
    weights = np.ones(len(pixel_counts))
    weights[present] = (pixel_counts[present] / pixel_counts.sum()) ** -BALANCE_POWER
    weights[present] /= weights[present].mean()
    return weights.clip(*WEIGHT_RANGE)


def images_showing(image_pixel_counts: np.ndarray) -> np.ndarray:
    """int64 (classes,): how many images show each class, from uint32 (images, classes), some thousand rows at a time:
    the table of a large set is larger than memory should be."""
    rows = range(0, len(image_pixel_counts), ROWS_AT_A_TIME)
    shown = ((image_pixel_counts[first : first + ROWS_AT_A_TIME] > 0).sum(axis=0) for first in rows)
    return sum(shown, np.zeros(image_pixel_counts.shape[1], np.int64))
