"""One shard: a plain tar that any WebDataset reader can read alone.

    KEY.png|jpg|qoi  the image
    KEY.mask.png     class ids, one channel
    KEY.json         key, height, width, label set's name, class names, flip pairs, ignore index

A sample's members stand together, in this order.
"""

import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.labels import LabelSet

SAMPLE_ROW = np.dtype(
    [
        ("shard", "<u4"),
        *((f"{member}_{field}", "<u8") for member in ("image", "mask", "json") for field in ("offset", "size")),
    ]
)


@dataclass(frozen=True)
class PackedSample:
    """A checked sample, ready to be written."""

    key: str
    image_bytes: bytes  # an upright 8-bit RGB file
    image_suffix: str  # its type: "png", "jpg" or "qoi"
    mask_bytes: bytes  # an 8-bit single-channel PNG
    height: int
    width: int
    pixel_counts: tuple[int, ...]  # one number a class; the pixels in none of them are ignored ones
    notes: tuple[str, ...] = ()  # what was done to the files, see `data.prepare.NOTES`


def write_tar(samples: Iterable[PackedSample], path: Path, label_set: LabelSet) -> None:
    """Writes one shard. The same samples give the same bytes: no times, no names of users or machines."""
    # Imported here because it imports torch: seconds, for each process that only prepares or reads samples.
    from webdataset import TarWriter

    labels = {"label_set": label_set.name, "classes": label_set.classes, "flip_pairs": label_set.flip_pairs}
    labels["ignore_index"] = label_set.ignore_index
    with path.open("wb") as file, TarWriter(file, user="root", group="root", mode=0o444, mtime=0, encoder=False) as tar:
        tar.tarstream.fileobj.bufsize = 1 << 16  # tarfile's own 10 kB blocks cost a tenth of the whole packing
        for sample in samples:
            assert "." not in sample.key, f"WebDataset would split the key {sample.key!r} at its dot"
            meta = {"key": sample.key, "height": sample.height, "width": sample.width, **labels}
            # One call a member: TarWriter sorts those of one call by name, which puts a JPEG first and a PNG last.
            tar.write({"__key__": sample.key, sample.image_suffix: sample.image_bytes})
            tar.write({"__key__": sample.key, "mask.png": sample.mask_bytes})
            tar.write({"__key__": sample.key, "json": json.dumps(meta).encode()})


def locate_members(path: Path) -> np.ndarray:
    """Where each sample's members lie in a tar, as `SAMPLE_ROW` (samples,): read back from the headers themselves.

    `shard` is 0 in all of them: a tar does not know its number in its set.
    """
    with tarfile.open(path) as tar:
        places = [(member.offset_data, member.size) for member in tar]
    samples = zip(places[0::3], places[1::3], places[2::3], strict=True)
    return np.array([(0, *image, *mask, *meta) for image, mask, meta in samples], dtype=SAMPLE_ROW)
