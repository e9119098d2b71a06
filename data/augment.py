"""From a decoded pair to the network's input size: the training augmentation and the validation resize.

The training recipe of Sapiens (resize by a random ratio, crop, resize to the input, rotate, flip with label swap,
photometric distortion) is drawn first and composed into one affine matrix: image and mask are warped once, together.
"""

import cv2
import numpy as np
from pydantic import BaseModel, Field, field_validator

CROP_TRIES = 10
IMAGE_FILL = (124, 116, 104)  # the normalisation mean: nothing once normalised


class AugmentConfig(BaseModel, frozen=True, extra="forbid"):
    """The training augmentation; the defaults are those of the Sapiens face recipe."""

    scale: tuple[float, float] = Field((0.2, 2.0), description="range of the resize ratio around the input size")
    max_class_share: float = Field(0.75, gt=0, le=1, description="a crop holds at most this share of one class")
    rotate_probability: float = Field(0.5, ge=0, le=1)
    rotate_degrees: float = Field(45.0, ge=0, le=180, description="rotation is uniform in +- this")
    flip_probability: float = Field(0.5, ge=0, le=1, description="left/right flip, labels swapped by the flip pairs")
    photometric: bool = Field(True, description="brightness, contrast, saturation and hue, each with p = 0.5")

    @field_validator("scale")
    @classmethod
    def _a_range(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"{list(scale)} is no range of ratios; write [low, high] with 0 < low <= high")
        return scale


def augment(
    image: np.ndarray,
    label: np.ndarray,
    size: tuple[int, int],
    config: AugmentConfig,
    flip_table: np.ndarray,
    ignore_index: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """One random view of a training pair.

    Args:
        image: RGB uint8 (h, w, 3).  label: class ids uint8 (h, w).
        size: (H, W) of the result.
        flip_table: uint8 (256,), the class of each class in a mirrored image.
    Returns:
        RGB uint8 (H, W, 3) and uint8 (H, W). What lies outside the source is `IMAGE_FILL` and `ignore_index`.
    """
    ratio = _resize_ratio(label.shape, size, rng.uniform(*config.scale))
    crop = _draw_crop(label, ratio, size, config.max_class_share, rng)
    rotated = rng.random() < config.rotate_probability
    degrees = rng.uniform(-config.rotate_degrees, config.rotate_degrees) if rotated else 0.0
    flipped = rng.random() < config.flip_probability

    to_output = _output_matrix(crop, size, degrees, flipped)  # from the resized image
    label = flip_table[label] if flipped else label
    label = _warp(label, to_output @ np.diag([ratio, ratio, 1.0]), size, cv2.INTER_NEAREST, ignore_index)
    if ratio < 1:  # shrink by areas first: warpAffine alone would alias
        height, width = image.shape[:2]
        small = max(1, round(width * ratio)), max(1, round(height * ratio))
        image = cv2.resize(image, small, interpolation=cv2.INTER_AREA)
        to_output = to_output @ np.diag([width * ratio / small[0], height * ratio / small[1], 1.0])
    else:
        to_output = to_output @ np.diag([ratio, ratio, 1.0])
    image = _warp(image, to_output, size, cv2.INTER_LINEAR, IMAGE_FILL)
    if config.photometric:
        image = distort_colours(image, rng)
    return image, label


def resize_for_validation(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """RGB uint8 (h, w, 3) -> (H, W, 3), bilinear, the aspect ratio not kept (as the original evaluates)."""
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def _resize_ratio(shape: tuple[int, int], size: tuple[int, int], scale: float) -> float:
    """The factor that fits the image into `scale` times the input size, long edge to long edge."""
    return scale * min(max(size) / max(shape), min(size) / min(shape))


def _draw_crop(
    label: np.ndarray, ratio: float, size: tuple[int, int], max_class_share: float, rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """(x, y, width, height) in pixels of the resized image: no larger than the input size nor than that image."""
    resized_height, resized_width = label.shape[0] * ratio, label.shape[1] * ratio
    height, width = min(size[0], resized_height), min(size[1], resized_width)
    for _ in range(CROP_TRIES if max_class_share < 1 else 1):
        x, y = rng.uniform(0, resized_width - width), rng.uniform(0, resized_height - height)
        rows = slice(int(y / ratio), max(int(y / ratio) + 1, int((y + height) / ratio)))
        columns = slice(int(x / ratio), max(int(x / ratio) + 1, int((x + width) / ratio)))
        stride = max(1, min(label.shape) // 128)  # a share needs no full resolution
        counts = np.bincount(label[rows, columns][::stride, ::stride].ravel(), minlength=256)[:255]
        if np.count_nonzero(counts) > 1 and counts.max() < max_class_share * counts.sum():
            break
    return x, y, width, height


def _output_matrix(
    crop: tuple[float, float, float, float], size: tuple[int, int], degrees: float, flipped: bool
) -> np.ndarray:
    """(3, 3) from the resized image to the output, both in continuous coordinates (a pixel's centre is at +0.5)."""
    x, y, crop_width, crop_height = crop
    height, width = size
    zoom_x, zoom_y = width / crop_width, height / crop_height
    crop_to_output = np.array([[zoom_x, 0, -x * zoom_x], [0, zoom_y, -y * zoom_y], [0, 0, 1]])
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    centre_x, centre_y = width / 2, height / 2
    rotate = np.array(
        [
            [cos, -sin, centre_x - cos * centre_x + sin * centre_y],
            [sin, cos, centre_y - sin * centre_x - cos * centre_y],
            [0, 0, 1],
        ]
    )  # clockwise on screen for positive degrees
    mirror = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) if flipped else np.eye(3)
    return mirror @ rotate @ crop_to_output


def _warp(source: np.ndarray, matrix: np.ndarray, size: tuple[int, int], interpolation: int, fill) -> np.ndarray:
    """cv2.warpAffine by a matrix in continuous coordinates; OpenCV's have the pixel centres at integers."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = (np.linalg.inv(half) @ matrix @ half)[:2]
    height, width = size
    if interpolation == cv2.INTER_NEAREST:
        return cv2.warpAffine(source, matrix, (width, height), flags=interpolation, borderValue=fill)
    # A constant border would bleed into the outermost pixels: replicate, then fill what lies outside.
    out = cv2.warpAffine(source, matrix, (width, height), flags=interpolation, borderMode=cv2.BORDER_REPLICATE)
    if matrix[0, 1]:
        inside = cv2.warpAffine(np.ones(source.shape[:2], np.uint8), matrix, (width, height), flags=cv2.INTER_NEAREST)
        out[inside == 0] = fill
    return out


def distort_colours(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Photometric distortion of an RGB uint8 image: brightness +-32, contrast and saturation 0.5-1.5, hue +-18."""
    if rng.random() < 0.5:
        image = scale_and_shift(image, 1.0, rng.uniform(-32, 32))
    contrast = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    contrast_first = rng.random() < 0.5
    if contrast_first:
        image = scale_and_shift(image, contrast, 0.0)
    saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-18, 18)) if rng.random() < 0.5 else 0
    image = adjust_hue_saturation(image, hue, saturation)
    return image if contrast_first else scale_and_shift(image, contrast, 0.0)


def scale_and_shift(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """uint8 image * factor + shift, clipped to 0..255 and truncated."""
    if factor == 1.0 and shift == 0.0:
        return image
    return cv2.LUT(image, np.clip(np.arange(256, dtype=np.float32) * factor + shift, 0, 255).astype(np.uint8))


def adjust_hue_saturation(image: np.ndarray, hue: int, saturation: float) -> np.ndarray:
    """RGB uint8; hue is a shift in OpenCV's units (180 a full turn), saturation a factor."""
    if hue == 0 and saturation == 1.0:
        return image
    table = np.empty((256, 1, 3), np.uint8)
    table[:, 0, 0] = (np.arange(256) + hue) % 180
    table[:, 0, 1] = np.clip(np.arange(256, dtype=np.float32) * saturation, 0, 255)
    table[:, 0, 2] = np.arange(256)
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table), cv2.COLOR_HSV2RGB)
