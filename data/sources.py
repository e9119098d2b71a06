"""Raw data sets: how each lays its files on disk, as a list of (key, image, mask, split).

A source only looks at names. Whether the files are there, whole and sensible is `data.prepare`'s business.
A new data set is one short class at the end of this file and a line in `SOURCES`.
"""

import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from data import DataError
from data.file_lists import read_records

Split = Literal["train", "val"]
# Only these: notes, landmarks and label files often lie beside the images, under the same names.
IMAGE_SUFFIXES = {
    ".avif", ".bmp", ".dib", ".gif", ".heic", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
}  # fmt: skip


@dataclass(frozen=True)
class RawExample:
    """One image and its labels on disk. `mask` is None where no mask was found; `image` may name a missing file
    where only a mask was found. The key is unique in its split and safe in a WebDataset tar. `split` is None where
    the data set itself does not say which examples validate."""

    key: str
    image: Path
    mask: Path | None
    split: Split | None = None


class Source:
    """A raw data set's layout on disk."""

    label_set: ClassVar[str | None] = None  # the name of the label set that the masks use, where it is always the same
    layout: ClassVar[str]  # one line: what the root should hold
    same_key: ClassVar[str] = "rename or delete one"  # what to do about two examples
    folders: ClassVar[dict[Split, tuple[str, str]]] = {}  # for each split the folders of images and of masks

    def examples(self, root: Path) -> list[RawExample]:
        """All examples under `root`, sorted by (split, key); the same files give the same list on any file system.

        Raises:
            DataError: no such folder, no such files in it, two examples with one key, or a list of files that is bad.
        """
        root = Path(root)
        found = sorted(self.find(root), key=lambda example: (example.split or "", example.key))
        if not found:
            what = "no images or masks here" if root.exists() else "no such folder"
            raise DataError(f"{root}: {what}; expected {self.layout}")
        for a, b in pairwise(found):
            if (a.split, a.key) == (b.split, b.key):
                raise DataError(f"{root}: {a.image} and {b.image} give the same key {a.key!r}; {self.same_key}")
        return found

    def find(self, root: Path) -> Iterator[RawExample]:
        """The examples in any order: those of `folders`, unless the data set has its own way."""
        for split, (images, masks) in self.folders.items():
            if (root / images).exists() or (root / masks).exists():  # a part of a data set will do
                yield from self.pair_folders(root / images, root / masks, split)

    def pair_folders(
        self, images: Path, masks: Path, split: Split | None = None, mask_suffix: str = ""
    ) -> Iterator[RawExample]:
        """Pairs the files of two folders, their subfolders included; one may be, or lie in, the other."""
        mask_files = [path for path in self.image_files(masks, images) if path.stem.endswith(mask_suffix)]
        are_masks = set(mask_files) if images == masks else set()
        image_files = (path for path in self.image_files(images, masks) if path not in are_masks)
        yield from pair(by_name(image_files, images), by_name(mask_files, masks, mask_suffix), images, split)

    def image_files(self, folder: Path, without: Path | None = None) -> Iterator[Path]:
        """The images under `folder`, by their file type, but those in its subfolder `without`, and no hidden ones:
        archives packed on a Mac leave a `._000000.png` beside each file."""
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; expected {self.layout}")
        for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
            here = Path(parent)
            folders[:] = [
                name for name in folders
                if name[0] != "." and here / name != without and not _leads_up(here / name)
            ]  # fmt: skip
            shown = (name for name in names if name[0] != ".")
            yield from (here / name for name in shown if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def _leads_up(path: Path) -> bool:
    """Whether it is a link to a folder that holds it, which would be walked for ever."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def by_name(paths: Iterable[Path], folder: Path, suffix: str = "") -> dict[str, Path]:
    """Files by what pairs them: the path in `folder`, without extension and without `suffix`.

    Raises:
        DataError: two files have one name.
    """
    found: dict[str, Path] = {}
    for path in sorted(paths):
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
        if name in found:
            raise DataError(f"{folder}: {found[name].name} and {path.name} give the same key; rename or delete one")
        found[name] = path
    return found


def pair(
    images: dict[str, Path], masks: dict[str, Path], folder: Path, split: Split | None = None
) -> Iterator[RawExample]:
    """Examples from images and masks by name: the same name first, then the same but for upper and lower case and the
    composition of accents (Macs take "é" apart), where that leaves no choice. The others are examples too: of an image
    without mask, or of a mask whose image is not in `folder`."""
    found = {name: name for name in images.keys() & masks.keys()}
    folded: dict[str, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for column, names in enumerate((images, masks)):
        for name in names.keys() - found.keys():
            folded[unicodedata.normalize("NFC", name).casefold()][column].append(name)
    found |= {one[0]: other[0] for one, other in folded.values() if len(one) == len(other) == 1}
    for name, path in images.items():
        yield RawExample(safe_key(name), path, masks[found[name]] if name in found else None, split)
    for name in masks.keys() - set(found.values()):
        yield RawExample(safe_key(name), folder / f"{name}.*", masks[name], split)


def safe_key(name: str) -> str:
    """A WebDataset key for a file's name without its extension: itself, where it is short and of [A-Za-z0-9_-] only.

    WebDataset splits a member's name at its first dot, and a tar header holds 100 bytes. Other names are cleaned and
    get a piece of their own hash: two names never share a key, and a name's key does not depend on its neighbours.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)[:60] + f"-{digest}"


class FaceSynthetics(Source):
    label_set = "face19"
    layout = "the unpacked FaceSynthetics: NNNNNN.png (image) beside NNNNNN_seg.png (labels)"

    def find(self, root: Path) -> Iterator[RawExample]:
        files = [path for path in self.image_files(root) if path.parent == root and path.suffix.lower() == ".png"]
        if not files:
            raise DataError(f"{root}: no .png files in this folder; expected {self.layout}")
        images = by_name((path for path in files if not path.stem.endswith("_seg")), root)
        return pair(images, by_name((path for path in files if path.stem.endswith("_seg")), root, "_seg"), root)


class Lip(Source):
    label_set = "lip20"
    layout = "LIP: images/{train,val}_images/*.jpg and segmentations/{train,val}_segmentations/*.png"
    folders = {
        "train": ("images/train_images", "segmentations/train_segmentations"),
        "val": ("images/val_images", "segmentations/val_segmentations"),
    }


class Cihp(Source):
    label_set = "cihp20"
    layout = "CIHP: {Training,Validation}/Images/*.jpg and {Training,Validation}/Category_ids/*.png"
    folders = {
        "train": ("Training/Images", "Training/Category_ids"),
        "val": ("Validation/Images", "Validation/Category_ids"),
    }


class Sapiens2(Source):
    layout = 'images/, masks/ and annotations/{train,val}.json, a list of {"image": "images/...", "mask": "masks/..."}'

    class Record(BaseModel):
        image: str = Field(min_length=1)
        mask: str = Field(min_length=1)

    def find(self, root: Path) -> Iterator[RawExample]:
        for split in ("train", "val"):
            file = root / "annotations" / f"{split}.json"
            if not file.exists():
                continue
            for where, record in read_records(file, self.Record, self.layout):
                for key, path in record:
                    # By the words of the path only: images/ itself may be a link to anywhere.
                    if not Path(os.path.abspath(root / path)).is_relative_to(os.path.abspath(root)):
                        raise DataError(f"{where}: key '{key}': {path!r} leaves {root}; give a path inside it")
                name = _without_extension(record.image).removeprefix("images/")
                yield RawExample(safe_key(name), root / record.image, root / record.mask, split)


@dataclass(frozen=True)
class Pairs(Source):
    """Two folders of images and masks, or a list of files.

    Args:
        images, masks: folders under the root, or absolute.
        mask_suffix: what a mask's name, without extension, has more than its image's, such as "_seg".
    """

    layout = "two folders of images and masks, or a .csv or .jsonl file of image, mask[, key][, split: train or val]"
    same_key = "give each its own in a column 'key'"
    images: str = "images"
    masks: str = "masks"
    mask_suffix: str = ""

    class Record(BaseModel, extra="allow"):
        image: str = Field(min_length=1)
        mask: str | None
        key: str | None = None
        split: Split | None = None

    def find(self, root: Path) -> Iterator[RawExample]:
        if root.suffix.lower() in (".csv", ".jsonl") and not root.is_dir():
            return self._listed(root)
        images, masks = root / self.images, root / self.masks
        if images == masks and not self.mask_suffix:
            raise DataError(f"{images}: images and masks share this folder; tell masks apart by their mask suffix")
        return self.pair_folders(images, masks, mask_suffix=self.mask_suffix)

    def _listed(self, file: Path) -> Iterator[RawExample]:
        split_given = set()
        for where, record in read_records(file, self.Record, self.layout):
            for name in record.model_extra:  # a misspelt "split" would be drawn anew by chance
                if close := get_close_matches(name.lower(), ("key", "split"), cutoff=0.75):
                    raise DataError(f"{where}: key {name!r}: unknown, did you mean {close[0]!r}? Rename or remove it")
            split_given.add(record.split is not None)
            if len(split_given) > 1:
                raise DataError(f"{where}: key 'split': only some examples have one; give it for all or for none")
            mask = file.parent / record.mask if record.mask else None
            key = safe_key(record.key or _without_extension(record.image))
            yield RawExample(key, file.parent / record.image, mask, record.split)


def _without_extension(path: str) -> str:
    return os.path.splitext(os.path.normpath(path))[0]


SOURCES: dict[str, type[Source]] = {
    "facesynthetics": FaceSynthetics, "lip": Lip, "cihp": Cihp, "sapiens2": Sapiens2, "pairs": Pairs
}  # fmt: skip
