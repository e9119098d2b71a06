"""Photos for prediction: which files, their pixels upright in RGB, and results that are written whole or not at all."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from model import ModelError

# Only these are taken from folders and patterns: notes and label files often lie beside the images.
SUFFIXES = {
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip
ORIENTATION = 0x0112  # the EXIF tag


class UnreadableImage(ValueError):
    """An image that cannot be used. The message is one line that gives the reason; the caller knows the file."""


def find_images(inputs: Sequence[str], without: Collection[Path] = ()) -> dict[Path, Path]:
    """Image files -> the name of each one's results: its path without suffix in the folder that all inputs share. Images
    whose names differ in the suffix only keep it: a.jpg and a.png become "a.jpg" and "a.png".

    Args:
        inputs: files, whatever their suffix; folders, searched with their sub-folders, and glob patterns, for SUFFIXES.
        without: folders from which nothing is taken.

    Raises:
        ModelError: an input holds no image.
    """
    found: dict[Path, None] = {}  # in order, and each file once
    roots, closed = [], [os.path.realpath(folder) for folder in without]
    for text in inputs:
        root, files = _search(text)
        files = [file for file in files if not any(file.resolve().is_relative_to(folder) for folder in closed)]
        if not files:
            raise ModelError(f"{text}: no image there; name a file, a folder with images, or a pattern such as 'photos/*.jpg'")
        roots.append(root)
        found |= dict.fromkeys(files)
    shared = os.path.commonpath(roots)
    full = {file: file.relative_to(shared) for file in found}
    names = {file: path.with_suffix("") for file, path in full.items()}
    while alike := [file for file, n in _uses(names).items() if n > 1 and names[file] != full[file]]:
        names |= {file: full[file] for file in alike}
    return names


def _uses(names: dict[Path, Path]) -> dict[Path, int]:
    """How many files have each one's name."""
    uses = Counter(names.values())
    return {file: uses[name] for file, name in names.items()}


def _search(text: str) -> tuple[Path, list[Path]]:
    """The folder that the input means, and its images in order."""
    path = Path(os.path.abspath(text))
    if path.is_file():  # even where its name looks like a pattern: "face [1].png"
        return path.parent, [path]
    root = path if path.is_dir() else Path(*takewhile(lambda part: not glob.has_magic(part), path.parts))
    pattern = f"{glob.escape(str(path))}/**" if path.is_dir() else str(path)
    matches = map(Path, sorted(glob.iglob(pattern, recursive=True)))
    return root, [match for match in matches if match.suffix.lower() in SUFFIXES and match.is_file()]


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (h, w, 3), upright, of any format that Pillow knows; the first picture of files that hold many.

    As when data sets are packed: transparent pixels lie on black, 16-bit ones lose their lower byte.

    Raises:
        UnreadableImage: damaged, no image, or of pixels that are not colours.
    """
    try:
        content = path.read_bytes()
        image = Image.open(BytesIO(content))
        if image.format in ("JPEG", "MPO"):
            pixels = simplejpeg.decode_jpeg(content, "RGB")  # Pillow would pass over damage
        else:
            image.verify()  # the checksums of PNG, which load() ignores; after it a file must be opened again
            image = Image.open(BytesIO(content))
            image.load()
            pixels = _rgb(image)
        return _upright(pixels, image)
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = "not an image of a known format" if content else "an empty file"
    except Exception as error:  # on damaged files decoders raise nearly anything: OSError, SyntaxError, struct.error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(reason.split()) or type(error).__name__
    raise UnreadableImage(reason)


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("pixels of floating point numbers; save it as 8-bit RGB")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or not 4096 <= values.max() <= 65535:
            raise ValueError(f"pixels from {values.min()} to {values.max()}, not over the range of 16 bits; save it as 8-bit RGB")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def _upright(pixels: np.ndarray, image: Image.Image) -> np.ndarray:
    """`pixels`, turned as the EXIF or XMP of `image` says."""
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a malformed block; the pixels are none the worse
        return pixels
    if orientation == 1:
        return pixels
    turned = Image.fromarray(pixels)
    turned.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(turned))


def save(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` write a file beside, which then takes the place of `path`. Raises OSError naming `path`."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path}: cannot be written ({error.strerror or error}); choose another place for it") from None
        raise
