"""What is drawn for one training example: its view, a few numbers. `data.render` makes pixels of them.

The recipe is that of Sapiens: resize by a random ratio, crop, resize to the input, rotate, flip with label swap,
distort the colours. Drawing needs the mask alone, so that a large JPEG can be decoded as small as its view allows.
"""

from dataclasses import dataclass
from math import isqrt
from typing import NamedTuple

import numpy as np
from pydantic import Field, field_validator, model_validator

from data.yaml_files import Settings

CROP_TRIES = 10
THUMBNAIL = 64  # pixels along a side: a class's share of a crop is seen well enough in so few
MIN_UNITS = 16  # along the shorter side: the grid of `View.unit` must stay fine beside the image
LARGEST_SHRINK = 8  # that JPEG offers


class AugmentConfig(Settings):
    """The training augmentation; the defaults are those of the Sapiens face recipe, but that shapes are kept."""

    scale: tuple[float, float] = Field((0.2, 2.0), description="range of the resize ratio around the input size")
    max_class_share: float = Field(0.75, gt=0, le=1, description="a crop holds at most this share of one class")
    keep_aspect: bool = Field(True, description="false: stretch what is smaller than the input to it, as Sapiens does")
    rotate_probability: float = Field(0.5, ge=0, le=1)
    rotate_degrees: float = Field(45.0, ge=0, le=180, description="rotation is uniform in +- this")
    flip_probability: float = Field(0.5, ge=0, le=1, description="left/right flip, labels swapped by the flip pairs")
    photometric: bool = Field(True, description="brightness, contrast, saturation and hue, each with p = 0.5")
    blur_probability: float = Field(0.0, ge=0, le=1)
    blur_sigma: tuple[float, float] = Field((0.1, 2.0), description="range, in pixels of the input")
    noise_probability: float = Field(0.0, ge=0, le=1)
    noise_sigma: tuple[float, float] = Field((1.0, 12.0), description="range, in gray levels")
    background_probability: float = Field(0.0, ge=0, le=1, description="a colour or clouds instead of the background")
    background_class: int = Field(0, ge=0, le=254, description="the id of the class that is the background")
    faithful: bool = Field(False, description="render step by step, as Sapiens does: slower, for comparisons")
    on_device: bool = Field(False, description="workers only decode and shrink; the views are made on the training device")

    @field_validator("scale", "blur_sigma", "noise_sigma")
    @classmethod
    def _a_range(cls, pair: tuple[float, float]) -> tuple[float, float]:
        if not 0 < pair[0] <= pair[1] <= 255:
            raise ValueError(f"{list(pair)} is no range; write [low, high] with 0 < low <= high <= 255")
        return pair

    @model_validator(mode="after")
    def _one_way(self) -> "AugmentConfig":
        if self.faithful and self.on_device:
            raise ValueError("`faithful` views are made step by step by the workers; set `on_device` or `faithful` to false")
        return self


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    x: int
    y: int
    width: int
    height: int

    def of(self, array: np.ndarray) -> np.ndarray:
        """These pixels of an array (h, w, ...): no copy."""
        return array[self.y : self.y + self.height, self.x : self.x + self.width]


@dataclass(frozen=True)
class Colour:
    """A photometric distortion: brightness, then contrast and (saturation, hue) in either order."""

    brightness: float = 0.0  # added, in gray levels
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0  # added, in OpenCV's units: 180 are a full turn
    contrast_first: bool = True


@dataclass(frozen=True)
class View:
    """All that is random about one example.

    `box` of the source is seen at the resolution `seen`, enlarged to `place` in the output, which is then rotated about
    its centre and mirrored. What the box does not reach is filled.
    """

    size: tuple[int, int]  # (H, W) of the output
    box: Box  # in the source; multiples of `unit`
    unit: int  # a power of two: so many source pixels across make one pixel of `seen` or less
    seen: tuple[int, int]  # (width, height): a small ratio loses detail even where the result is enlarged again
    place: Box  # in the output, before rotation and flip
    degrees: float = 0.0  # clockwise
    flipped: bool = False
    colour: Colour = Colour()
    background: tuple[int, int] | None = None  # (class to replace, cells along a side of the coarse random texture)
    blur: float = 0.0  # standard deviation in output pixels; 0: none
    noise: float = 0.0  # standard deviation in gray levels; 0: none
    seed: int = 0  # of the pixels of texture and noise
    faithful: bool = False

    @property
    def shrink(self) -> int:
        """1, 2, 4 or 8: the image may be decoded at 1/shrink of the mask's size, its details would be lost anyhow."""
        return 1 if self.faithful else min(self.unit, LARGEST_SHRINK)

    @property
    def image_patch(self) -> tuple[int, int]:
        """(width, height) in which the box of the image is kept before it is enlarged: never above the output's."""
        return min(self.box.width // self.unit, self.seen[0]), min(self.box.height // self.unit, self.seen[1])

    @property
    def label_patch(self) -> tuple[int, int]:
        """(width, height) in which the box of the mask is kept before it is enlarged: never above the output's."""
        return min(self.box.width, self.place.width), min(self.box.height, self.place.height)


def draw_view(
    label: np.ndarray, size: tuple[int, int], config: AugmentConfig, rng: np.random.Generator, ignore_index: int = 255
) -> View:
    """Draws a view of an example.

    Args:
        label: its mask, uint8 (h, w); a crop is judged by the classes in it.
        size: (H, W) of the output.
        ignore_index: the label that is no class.
    """
    height, width = label.shape
    ratio = rng.uniform(*config.scale) * min(max(size) / max(label.shape), min(size) / min(label.shape))
    crop = min(size[1], width * ratio), min(size[0], height * ratio)  # in pixels of the resized image
    unit = _unit(ratio, label.shape)
    box = _draw_box(label, crop, ratio, unit, config.max_class_share, ignore_index, rng)
    place = _draw_place(crop, size, rng) if config.keep_aspect else Box(0, 0, size[1], size[0])
    return View(
        size=size,
        box=box,
        unit=unit,
        seen=(max(1, round(crop[0])), max(1, round(crop[1]))),
        place=place,
        degrees=rng.uniform(-1, 1) * config.rotate_degrees if rng.random() < config.rotate_probability else 0.0,
        flipped=bool(rng.random() < config.flip_probability),
        colour=_draw_colour(rng) if config.photometric else Colour(),
        background=_draw_background(config, rng),
        blur=rng.uniform(*config.blur_sigma) if rng.random() < config.blur_probability else 0.0,
        noise=rng.uniform(*config.noise_sigma) if rng.random() < config.noise_probability else 0.0,
        seed=int(rng.integers(2**63)),
        faithful=config.faithful,
    )


def _unit(ratio: float, shape: tuple[int, int]) -> int:
    """The largest power of two that, as a shrink, leaves all the detail of a resize by `ratio`."""
    unit = 1
    while ratio * unit * 2 <= 1 and min(shape) >= unit * 2 * MIN_UNITS:
        unit *= 2
    return unit


def _draw_box(
    label: np.ndarray,
    crop: tuple[float, float],
    ratio: float,
    unit: int,
    max_class_share: float,
    ignore_index: int,
    rng: np.random.Generator,
) -> Box:
    """A crop as a box in the source, on a grid of `unit` pixels: the first in which no class has too large a share."""
    wide, high = label.shape[1] // unit, label.shape[0] // unit
    width, height = (
        min(most, max(1, round(length / (ratio * unit)))) for most, length in zip((wide, high), crop, strict=True)
    )

    def draw() -> Box:
        x, y = rng.integers(wide - width + 1), rng.integers(high - height + 1)
        return Box(int(x) * unit, int(y) * unit, width * unit, height * unit)

    box = draw()
    if max_class_share == 1 or (width, height) == (wide, high):
        return box
    step = max(1, min(isqrt(label.size) // THUMBNAIL, *label.shape))
    thumbnail = label[step // 2 :: step, step // 2 :: step]
    for _ in range(CROP_TRIES):
        if _is_mixed(thumbnail, box, step, max_class_share, ignore_index):
            break
        box = draw()
    return box


def _is_mixed(thumbnail: np.ndarray, box: Box, step: int, max_class_share: float, ignore_index: int) -> bool:
    """Whether the box holds two classes or more, none of them with more than its share of the pixels."""
    rows = slice(box.y // step, -(-(box.y + box.height) // step))
    columns = slice(box.x // step, -(-(box.x + box.width) // step))
    counts = np.bincount(thumbnail[rows, columns].ravel(), minlength=256)
    counts[ignore_index] = 0
    return np.count_nonzero(counts) > 1 and counts.max() < max_class_share * counts.sum()


def _draw_place(crop: tuple[float, float], size: tuple[int, int], rng: np.random.Generator) -> Box:
    """The crop, enlarged by one factor until it reaches two borders of the output."""
    zoom = min(size[1] / crop[0], size[0] / crop[1])
    width, height = max(1, round(crop[0] * zoom)), max(1, round(crop[1] * zoom))
    x, y = rng.integers(size[1] - width + 1), rng.integers(size[0] - height + 1)
    return Box(int(x), int(y), width, height)


def _draw_colour(rng: np.random.Generator) -> Colour:
    brightness, contrast, saturation, hue = rng.random(4) < 0.5
    return Colour(
        brightness=rng.uniform(-32, 32) if brightness else 0.0,
        contrast=rng.uniform(0.5, 1.5) if contrast else 1.0,
        saturation=rng.uniform(0.5, 1.5) if saturation else 1.0,
        hue=int(rng.integers(-18, 18)) if hue else 0,
        contrast_first=bool(rng.random() < 0.5),
    )


def _draw_background(config: AugmentConfig, rng: np.random.Generator) -> tuple[int, int] | None:
    if rng.random() >= config.background_probability:
        return None
    return config.background_class, int(rng.choice([1, 2, 4, 8, 16, 32]))
