"""Raw data sets: how each lays its files on disk, as a list of (key, image, mask).

A source only looks at names. Whether the files are there, whole and sensible is `data.prepare`'s business.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data import DataError


@dataclass(frozen=True)
class RawExample:
    """One image and its labels on disk. `mask` is None where no mask was found; `image` may name a missing file
    where only a mask was found. The key is unique in its data set and safe in a WebDataset tar."""

    key: str
    image: Path
    mask: Path | None


@dataclass(frozen=True)
class Source:
    """A raw data set: how to list it, and the name of the label set that its masks use."""

    list_examples: Callable[[Path], list[RawExample]]
    label_set: str


def facesynthetics(root: Path) -> list[RawExample]:
    """Examples of FaceSynthetics, sorted by key: `NNNNNN.png` with `NNNNNN_seg.png`, landmarks ignored.

    Raises:
        DataError: no such folder, no such files in it, or two files that differ only in upper and lower case.
    """
    root = Path(root)
    expected = "expected the unpacked FaceSynthetics: NNNNNN.png (image) beside NNNNNN_seg.png (labels)"
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; {expected}")
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    for path in root.iterdir():
        # Archives packed on a Mac leave a `._000000.png` beside each file.
        if path.suffix.lower() != ".png" or path.name.startswith("."):
            continue
        found, stem = (masks, path.stem[:-4]) if path.stem.endswith("_seg") else (images, path.stem)
        if stem in found:
            raise DataError(f"{root}: {found[stem].name} and {path.name} give the same key; rename or delete one")
        found[stem] = path
    if not images and not masks:
        raise DataError(f"{root}: no .png files in this folder; {expected}")
    stems = images.keys() | masks.keys()
    examples = [RawExample(safe_key(s), images.get(s, root / f"{s}.png"), masks.get(s)) for s in stems]
    return sorted(examples, key=lambda example: example.key)


def safe_key(name: str) -> str:
    """A WebDataset key for a file's name without its extension: itself, where it is short and of [A-Za-z0-9_-] only.

    WebDataset splits a member's name at its first dot, and a tar header holds 100 bytes. Other names are cleaned and
    get a piece of their own hash: two names never share a key, and a name's key does not depend on its neighbours.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60] + f"-{digest}"


SOURCES = {"facesynthetics": Source(facesynthetics, "face19")}
