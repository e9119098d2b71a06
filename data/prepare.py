"""One raw example to one sample that is ready to be packed, or to a named problem.

What is stored is what any decoder reads in the same way: images as upright 8-bit RGB (transparency shown on black,
16-bit values by their high byte), masks as 8-bit single-channel PNG of class ids. Files that are so already keep their
bytes. Pillow decodes here, because cv2 returns a truncated file as a half grey picture without a word.
"""

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.labels import LabelSet
from data.sources import RawExample
from data.tars import PackedSample

KINDS = {
    "image_missing": "a mask without its image",
    "mask_missing": "an image without its mask",
    "undecodable": "a file that is damaged or no image; copy it again",
    "mask_not_index": "a mask that is not an 8-bit PNG of class ids; convert it",
    "size_mismatch": "image and mask differ in size",
    "label_out_of_range": "a mask with values that are neither a class nor the ignored one",
    "mask_empty": "a mask of ignored pixels only",
}
SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg"}  # MPO: a JPEG with a second picture behind it, from phones
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True)
class Problem:
    """Why an example cannot be packed: one of `KINDS`, the file at fault, what was found in it."""

    kind: str
    file: str
    detail: str


class _Rejected(Exception):
    """Carries a Problem's fields out of the checks below."""


def prepare(example: RawExample, label_set: LabelSet) -> PackedSample | Problem:
    """Reads and checks one example. Whatever is wrong with its files comes back as a Problem; the first one found."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on odd EXIF blocks; what matters raises
            return _prepare(example, label_set)
    except _Rejected as rejected:
        kind, path, detail = rejected.args
        return Problem(kind, str(path), detail)


def _prepare(example: RawExample, label_set: LabelSet) -> PackedSample:
    if not example.image.is_file():
        raise _Rejected("image_missing", example.mask or example.image, f"no {example.image.name}")
    if example.mask is None or not example.mask.is_file():
        raise _Rejected("mask_missing", example.image, "no mask beside it")
    image, image_bytes, image_suffix = _read_image(example.image)
    mask, mask_bytes = _read_mask(example.mask)
    height, width = mask.shape
    if image.size != (width, height):
        sizes = f"image {image.width}x{image.height}, mask {width}x{height}"
        raise _Rejected("size_mismatch", example.mask, sizes)
    counts = np.bincount(mask.ravel(), minlength=256)
    strange = [int(v) for v in np.flatnonzero(counts) if v >= label_set.num_classes and v != label_set.ignore_index]
    if strange:
        allowed = f"allowed are 0..{label_set.num_classes - 1} and {label_set.ignore_index}"
        raise _Rejected("label_out_of_range", example.mask, f"holds {_listed(strange)}; {allowed}")
    if counts[label_set.ignore_index] == mask.size:
        raise _Rejected("mask_empty", example.mask, f"every pixel is {label_set.ignore_index}")
    pixel_counts = tuple(counts[: label_set.num_classes].tolist())
    return PackedSample(example.key, image_bytes, image_suffix, mask_bytes, height, width, pixel_counts)


def _read_image(path: Path) -> tuple[Image.Image, bytes, str]:
    """The decoded image, upright, with the bytes to store and their suffix."""
    content, image, turned = _decode(path)
    if image.mode == "RGB" and not turned and image.format in SUFFIXES and _png_depth(content) in (None, 8):
        return image, content, SUFFIXES[image.format]
    image = _rgb(ImageOps.exif_transpose(image))
    return image, _png(image), "png"


def _read_mask(path: Path) -> tuple[np.ndarray, bytes]:
    """Class ids, uint8 (h, w), with the bytes to store."""
    content, image, turned = _decode(path)
    if image.format != "PNG":
        raise _Rejected("mask_not_index", path, f"a {image.format} file, whose compression may change class ids")
    if image.mode not in ("L", "P", "1"):
        raise _Rejected("mask_not_index", path, f"pixels of mode {image.mode}, not one 8-bit channel or a palette")
    mask = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint8)  # a palette's pixels are its indices
    depth = _png_depth(content)
    if image.mode == "L" and depth < 8:
        mask //= 255 // (2**depth - 1)  # decoders stretch 2 and 4-bit gray to 0..255
    plain = image.mode == "L" and depth == 8 and not turned and "transparency" not in image.info
    return mask, content if plain else _png(Image.fromarray(mask))


def _decode(path: Path) -> tuple[bytes, Image.Image, bool]:
    """A file's bytes, its wholly decoded image, and whether EXIF says that it lies on its side or is mirrored."""
    try:
        content = path.read_bytes()
        # PNG checksums: load() alone takes a third of the flipped bits in a mask for other labels.
        Image.open(BytesIO(content)).verify()
        image = Image.open(BytesIO(content))
        image.load()
        turned = image.getexif().get(ORIENTATION, 1) in range(2, 9)
    except UnidentifiedImageError:
        raise _Rejected("undecodable", path, "not an image" if content else "an empty file") from None
    except Exception as error:  # on damaged files decoders raise nearly anything: OSError, SyntaxError, struct.error
        raise _Rejected("undecodable", path, " ".join(str(error).split()) or type(error).__name__) from None
    return content, image, turned


def _png_depth(content: bytes) -> int | None:
    """Bits a channel by a PNG's header, None for other files. Pillow shows 16-bit RGB and 4-bit gray as 8-bit."""
    return content[24] if content.startswith(b"\x89PNG") else None


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode, with none of the file's metadata."""
    if image.mode.startswith("I"):
        high_byte = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(high_byte)
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return Image.fromarray(np.asarray(image.convert("RGB")))


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _listed(values: list[int]) -> str:
    if len(values) > 5:
        return f"{len(values)} values from {values[0]} to {values[-1]}"
    return ", ".join(str(value) for value in values)
