"""One raw example to one sample that is ready to be packed, or to a named problem.

What is stored is what any decoder reads in the same way: images as upright 8-bit RGB (transparency shown on black,
16-bit values by their high byte), masks as 8-bit single-channel PNG of class ids. Files that are so already may keep
their bytes; those were decoded here by the very functions of `data.codecs` that read them in training.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from data.codecs import encode_jpeg, encode_mask, encode_png, encode_qoi
from data.labels import LabelSet
from data.raw_files import Decoded, Rejected, read_image, read_mask
from data.sources import RawExample
from data.tars import PackedSample

KINDS = {
    "image_missing": "a mask without its image; add the image or delete the mask",
    "mask_missing": "an image without its mask; add the mask or delete the image",
    "undecodable": "a file that is damaged or no image; copy it again, or save it anew where it looks whole",
    "mask_not_index": "a mask that is no 8-bit PNG of class ids; convert it, or use --mask-colors if it shows colours",
    "size_mismatch": "image and mask differ in size; export the mask in the size of the image as it is seen upright",
    "label_out_of_range": "a mask with values that are neither a class nor the ignored one; check --label-set",
    "mask_empty": "a mask of ignored pixels only; label it or delete the pair",
    "mask_constant": "a mask of one class alone, as a placeholder or an edge map; label it, or allow it: --keep-constant",
    "mask_color_unknown": "a mask with colours of no class, as of softened outlines; export it without anti-aliasing",
}
NOTES = {
    "exif_applied": "turned or mirrored as its EXIF tag says; its mask is taken as drawn on the upright image",
    "image_converted": "no 8-bit RGB image of a kept format; converted to it",
    "image_shrunk": "shrunk to --max-side, together with its mask",
}


@dataclass(frozen=True)
class Rules:
    """What raw masks mean, and what is stored.

    Args:
        masks: what the raw masks' values mean.
        target: what is stored; the same set unless there is a `table`.
        table: uint8 (256,), a label map: ids of `masks` to ids of `target`.
        mask_colors: masks are pictures in the exact colours of `masks`, not class ids.
        keep_constant: masks of one single class are accepted.
        encode: "keep" stores a sound file's own bytes, and what must be changed as PNG; "lossless" stores images as
            QOI; "jpeg" as JPEG, where JPEGs that are neither turned nor shrunk keep their bytes: compressed a second
            time they would lose for nothing. Masks are always lossless.
        jpeg_quality: 1 to 100.
        max_side: images whose longer side has more pixels are shrunk to that.
    """

    masks: LabelSet
    target: LabelSet
    table: np.ndarray | None = None
    mask_colors: bool = False
    keep_constant: bool = False
    encode: Literal["keep", "lossless", "jpeg"] = "keep"
    jpeg_quality: int = 95
    max_side: int | None = None


@dataclass(frozen=True)
class Problem:
    """Why an example cannot be packed: one of `KINDS`, the file at fault, what was found in it."""

    kind: str
    file: str
    detail: str


def prepare(example: RawExample, rules: Rules) -> PackedSample | Problem:
    """Reads and checks one example. Whatever is wrong with its files comes back as a Problem; the first one found."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd EXIF blocks; what matters raises
            return _prepare(example, rules)
    except Rejected as rejected:
        kind, path, detail = rejected.args
        return Problem(kind, str(path), detail)


def _prepare(example: RawExample, rules: Rules) -> PackedSample:
    if not example.image.is_file():
        raise Rejected("image_missing", example.mask or example.image, f"no {example.image}")
    if example.mask is None or not example.mask.is_file():
        raise Rejected("mask_missing", example.image, f"no {example.mask or 'mask for it'}")
    image = read_image(example.image)
    mask = read_mask(example.mask, rules.masks if rules.mask_colors else None)
    _check_sizes(example.mask, image, mask)
    counts = _histogram(mask.pixels)
    _check_values(example.mask, counts, rules)

    height, width = mask.pixels.shape
    scale = 1.0 if rules.max_side is None else min(1.0, rules.max_side / max(height, width))
    if rules.table is not None:
        mask = mask._replace(pixels=cv2.LUT(mask.pixels, rules.table), own=None)
    if scale < 1:
        width, height = size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image._replace(pixels=cv2.resize(image.pixels, size, interpolation=cv2.INTER_AREA), own=None)
        # Plain INTER_NEAREST would shift the mask against the image by half a pixel.
        mask = mask._replace(pixels=cv2.resize(mask.pixels, size, interpolation=cv2.INTER_NEAREST_EXACT), own=None)
    if rules.table is not None or scale < 1:
        counts = _histogram(mask.pixels)
    if counts[rules.target.ignore_index] == mask.pixels.size:
        raise Rejected("mask_empty", example.mask, f"every pixel to be stored is {rules.target.ignore_index}")

    done = {
        "exif_applied": (image.orientation, mask.orientation) != (1, 1),
        "image_converted": not image.plain,
        "image_shrunk": scale < 1,
    }
    image_bytes, suffix = _stored_image(image, rules)
    mask_bytes = mask.own if mask.own and rules.encode == "keep" else encode_mask(mask.pixels)
    pixel_counts = tuple(counts[: rules.target.num_classes].tolist())
    notes = tuple(note for note in NOTES if done[note])
    return PackedSample(example.key, image_bytes, suffix, mask_bytes, height, width, pixel_counts, notes)


def _check_sizes(path: Path, image: Decoded, mask: Decoded) -> None:
    (height, width), (mask_height, mask_width) = image.pixels.shape[:2], mask.pixels.shape
    if (height, width) == (mask_height, mask_width):
        return
    detail = f"image {width}x{height}, mask {mask_width}x{mask_height}"
    if image.orientation >= 5 and (width, height) == (mask_height, mask_width):
        detail += f"; they agree without the image's EXIF rotation ({image.orientation}): turn the mask or drop the tag"
    raise Rejected("size_mismatch", path, detail)


def _check_values(path: Path, counts: np.ndarray, rules: Rules) -> None:
    num_classes, ignored = rules.masks.num_classes, rules.masks.ignore_index
    values = np.flatnonzero(counts).tolist()
    strange = [value for value in values if value >= num_classes and value != ignored]
    if strange:
        listed = ", ".join(str(value) for value in strange[:5])
        if len(strange) > 5:
            listed = f"{len(strange)} values from {strange[0]} to {strange[-1]}"
        detail = f"holds {listed}; allowed are 0..{num_classes - 1} and {ignored}"
        raise Rejected("label_out_of_range", path, detail)
    classes = [value for value in values if value != ignored]
    if len(classes) == 1 and not rules.keep_constant:
        which = "every pixel" if values == classes else f"every pixel that is not {ignored}"
        raise Rejected("mask_constant", path, f"{which} is {classes[0]} ({rules.masks.classes[classes[0]]})")


def _histogram(mask: np.ndarray) -> np.ndarray:
    """How often each value occurs, int64 (256,)."""
    rows = max(1, 2**24 // mask.shape[1])  # calcHist counts in float32, which is exact up to 2**24
    strips = (mask[top : top + rows] for top in range(0, len(mask), rows))
    return sum(cv2.calcHist([strip], [0], None, [256], [0, 256]).ravel().astype(np.int64) for strip in strips)


def _stored_image(image: Decoded, rules: Rules) -> tuple[bytes, str]:
    """The bytes to store, and their suffix."""
    if image.own and (rules.encode == "keep" or (rules.encode == "jpeg" and image.suffix == "jpg")):
        return image.own, image.suffix
    if rules.encode == "keep":
        return encode_png(image.pixels), "png"
    if rules.encode == "lossless":
        return encode_qoi(image.pixels), "qoi"
    return encode_jpeg(image.pixels, rules.jpeg_quality), "jpg"
