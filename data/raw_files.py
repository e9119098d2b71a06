"""Raw image and mask files to upright pixels, strictly: ordinary ones by `data.codecs`, odd ones by Pillow.

The first is three times as fast; Pillow knows nearly every format, and what EXIF says. Neither accepts damage.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from data.codecs import decode_image, decode_mask, png_chunks, png_header
from data.labels import LabelSet

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "QOI": "qoi"}  # MPO: a JPEG with a second one behind, of phones
ORIENTATION = 0x0112  # the EXIF tag
EXIF_IN_PNG = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # in Pillow's `info`, of chunks before the pixels
NO_ID = 256  # a colour of no class


class Rejected(Exception):
    """A file that cannot be used; its arguments are those of `data.prepare.Problem`: kind, path, detail."""


class Decoded(NamedTuple):
    """One file's picture, upright."""

    pixels: np.ndarray  # uint8: RGB (h, w, 3) of an image, ids (h, w) of a mask
    own: bytes | None  # the file's bytes, if `data.codecs` and any other decoder read just these pixels from them
    suffix: str  # of `own`
    plain: bool  # nothing was converted; turned it may be
    orientation: int  # as the file's EXIF has it, 1 to 8: 1 is upright, 5 to 8 lie on their side


def read_image(path: Path) -> Decoded:
    """An image in any format that Pillow knows, the first picture of files that hold many.

    Raises:
        Rejected: undecodable.
    """
    with _decoding(path) as (content, image):
        pixels, plain = _rgb_pixels(content, image)
        orientation = _orientation(content, image)
    if image.format != "TIFF":  # Pillow has turned those
        pixels = _upright(pixels, orientation)
    own = content if plain and orientation == 1 else None
    return Decoded(pixels, own, SUFFIXES.get(image.format, ""), plain, orientation)


def read_mask(path: Path, colors: LabelSet | None = None) -> Decoded:
    """A mask of class ids, gray or palette PNG; or, with `colors`, a PNG in the exact colours of that label set.

    Raises:
        Rejected: undecodable, mask_not_index, mask_color_unknown.
        DataError: two classes of `colors` share a colour.
    """
    id_of_color = None if colors is None else _id_of_color(colors)
    with _decoding(path) as (content, image):
        if image.format != "PNG":  # by its values alone a JPEG of class ids would often pass
            raise Rejected("mask_not_index", path, f"a {image.format} file, whose compression may change class ids")
        if id_of_color is None:
            pixels, plain = _ids(path, content, image)
        else:
            pixels, plain = _ids_of_colors(path, content, image, id_of_color), False
        orientation = _orientation(content, image)
    own = content if plain and orientation == 1 else None
    return Decoded(_upright(pixels, orientation), own, "png", plain, orientation)


def _rgb_pixels(content: bytes, image: Image.Image) -> tuple[np.ndarray, bool]:
    """RGB uint8 (h, w, 3) as the file has them, and whether it is plain."""
    if SUFFIXES.get(image.format) == "jpg":
        return decode_image(content), image.mode == "RGB"  # gray and CMYK too: Pillow would pass over damage
    if image.format in SUFFIXES and image.mode == "RGB" and not image.has_transparency_data:
        with suppress(ValueError):  # 16 bits, or damage, of which Pillow says more
            return decode_image(content), True
    image = _load(content)
    if image.mode == "F":
        raise ValueError("pixels of floating point numbers; save it as 8-bit RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}, not of 16 bits; save it as 8-bit RGB")
        if values.max() < 4096:
            raise ValueError(f"16-bit pixels of at most {values.max()}, of 65535: it would be black; save it as 8-bit RGB")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("RGB")), False


def _ids(path: Path, content: bytes, image: Image.Image) -> tuple[np.ndarray, bool]:
    """A mask's ids, and whether the file is plain."""
    if image.mode not in ("L", "P", "1"):
        raise Rejected("mask_not_index", path, f"pixels of mode {image.mode}, not one 8-bit channel or a palette")
    if image.mode == "L" and not image.has_transparency_data:
        with suppress(ValueError):  # 2 or 4 bits, or damage
            return decode_mask(content), True
    mask = np.asarray(_load(content)).astype(np.uint8)  # a palette's pixels are its indices
    if image.mode == "L" and (depth := png_header(content)[2]) < 8:
        mask //= 255 // (2**depth - 1)  # Pillow stretches 2 and 4-bit gray to 0..255
    return mask, False


def _ids_of_colors(path: Path, content: bytes, image: Image.Image, id_of_color: np.ndarray) -> np.ndarray:
    if image.mode not in ("RGB", "RGBA", "P"):
        raise Rejected("mask_not_index", path, f"pixels of mode {image.mode}, no colours; build without --mask-colors")
    if image.has_transparency_data and np.asarray(_load(content).convert("RGBA"))[..., 3].min() < 255:
        raise Rejected("mask_not_index", path, "transparent pixels, which have no colour; fill them")
    pixels = _rgb_pixels(content, image)[0]
    codes = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGRA).view("<u4")[..., 0] & 0xFFFFFF
    ids = id_of_color[codes]
    unknown = ids == NO_ID
    if unknown.any():
        y, x = (int(places[0]) for places in unknown.nonzero())
        first = f"the first {tuple(pixels[y, x].tolist())} at x={x}, y={y}"
        raise Rejected("mask_color_unknown", path, f"{np.count_nonzero(unknown)} of {unknown.size} pixels, {first}")
    return ids.astype(np.uint8)


@lru_cache(maxsize=1)
def _id_of_color(label_set: LabelSet) -> np.ndarray:
    """uint16 (2**24,): the id of each colour 0xRRGGBB, or `NO_ID`."""
    table = np.full(1 << 24, NO_ID, np.uint16)
    for (red, green, blue), i in label_set.ids_by_color().items():
        table[red << 16 | green << 8 | blue] = i
    return table


@contextmanager
def _decoding(path: Path) -> Iterator[tuple[bytes, Image.Image]]:
    """Gives a file's bytes and its picture with the header read only; whatever decoding raises becomes a problem."""
    try:
        content = path.read_bytes()
        yield content, Image.open(BytesIO(content))
    except (Rejected, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Rejected("undecodable", path, "not an image of a known format" if content else "an empty file") from None
    except Exception as error:  # on damaged files decoders raise nearly anything: OSError, SyntaxError, struct.error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Rejected("undecodable", path, " ".join(reason.split()) or type(error).__name__) from None


def _load(content: bytes) -> Image.Image:
    # PNG checksums: load() alone takes a third of the flipped bits in a mask for other labels.
    Image.open(BytesIO(content)).verify()
    image = Image.open(BytesIO(content))
    image.load()
    return image


def _orientation(content: bytes, image: Image.Image) -> int:
    """As EXIF or XMP have it, 1 to 8; 1 where they say nothing, or nothing sensible."""
    if image.format == "PNG" and not EXIF_IN_PNG & image.info.keys() and b"eXIf" not in png_chunks(content):
        return 1  # Pillow would decode the picture before it says so
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a malformed block; the pixels are none the worse
        return 1
    return orientation if orientation in range(1, 9) else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
