"""One raw example: odd files are brought into one form, bad ones are named."""

import struct
import zlib
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data.labels import load_label_set
from data.prepare import Problem, prepare
from data.sources import facesynthetics
from data.tars import PackedSample
from tests.raw_faces import SIZE, encoded, smooth

FACE19 = load_label_set("face19")


def prepared(tmp_path: Path, image: bytes | None = None, mask: bytes | None = None) -> PackedSample | Problem:
    """`prepare` of a sound example with the given file in place of its own."""
    rng = np.random.default_rng(0)
    (tmp_path / "a.png").write_bytes(encoded(smooth(rng)) if image is None else image)
    (tmp_path / "a_seg.png").write_bytes(encoded(rng.integers(0, 19, SIZE, np.uint8)) if mask is None else mask)
    return prepare(facesynthetics(tmp_path)[0], FACE19)


RGB = smooth(np.random.default_rng(1))
ALPHA = np.where(np.arange(32) < 16, 255, 0).astype(np.uint8) * np.ones(SIZE, np.uint8)


def oriented(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


@pytest.mark.parametrize("image", [encoded(RGB), encoded(RGB, "JPEG"), encoded(RGB, "JPEG", exif=oriented(1))])
def test_plain_images_keep_their_bytes(tmp_path, image):
    sample = prepared(tmp_path, image=image)
    assert sample.image_bytes == image and sample.image_suffix == ("png" if image[1:4] == b"PNG" else "jpg")


GRAY = RGB[..., 0]
PALETTE = Image.fromarray(RGB).quantize(200)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (encoded(GRAY), np.stack([GRAY] * 3, -1)),
        (encoded(GRAY.astype(np.uint16) * 257), np.stack([GRAY] * 3, -1)),
        (cv2.imencode(".png", RGB[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), RGB),
        (encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
        (encoded(np.dstack([RGB, ALPHA])), RGB * (ALPHA[..., None] > 0)),
        (encoded(np.ascontiguousarray(np.rot90(RGB)), exif=oriented(6)), RGB),  # 6: turn a quarter clockwise
        (encoded(np.ascontiguousarray(RGB[::-1, ::-1]), exif=oriented(3)), RGB),
    ],
    ids=["gray", "gray 16", "rgb 16", "palette", "alpha", "quarter turn", "half turn"],
)
def test_other_images_become_upright_rgb(tmp_path, image, expected):
    sample = prepared(tmp_path, image=image)
    shown = cv2.imdecode(np.frombuffer(sample.image_bytes, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(shown[..., ::-1], expected)


def test_cmyk_and_turned_jpegs_become_rgb_png(tmp_path):
    for image in (
        encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95),
        encoded(np.ascontiguousarray(np.rot90(RGB)), "JPEG", quality=95, exif=oriented(6)),
    ):
        sample = prepared(tmp_path, image=image)
        shown = np.asarray(Image.open(BytesIO(sample.image_bytes)))
        assert sample.image_suffix == "png" and np.abs(shown.astype(int) - RGB).mean() < 8


IDS = np.random.default_rng(2).integers(0, 16, SIZE, np.uint8)


def palette_mask() -> Image.Image:
    mask = Image.frombytes("P", IDS.shape[::-1], IDS.tobytes())
    mask.putpalette(np.random.default_rng(3).integers(0, 256, 768).astype(np.uint8).tobytes())
    return mask


def four_bit_gray(ids: np.ndarray) -> bytes:
    """A PNG of 4 bits a pixel, written chunk by chunk: neither Pillow nor cv2 writes one."""
    packed_rows = b"".join(b"\0" + bytes(row[0::2] << 4 | row[1::2]) for row in ids)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], 4, 0, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(packed_rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@pytest.mark.parametrize(
    ("mask", "kept"),
    [
        (encoded(IDS), True),
        (encoded(palette_mask()), False),
        (four_bit_gray(IDS), False),
        (encoded(IDS, transparency=0), False),
    ],
    ids=["gray", "palette", "4 bit", "with a transparent colour"],
)
def test_masks_are_stored_as_gray_class_ids(tmp_path, mask, kept):
    sample = prepared(tmp_path, mask=mask)
    assert (sample.mask_bytes == mask) is kept
    shown = cv2.imdecode(np.frombuffer(sample.mask_bytes, np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(shown, IDS)
    assert sample.pixel_counts == tuple(np.bincount(IDS.ravel(), minlength=19))


def flipped_bit(data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[-20] ^= 1  # in the checksum of the pixels
    return bytes(damaged)


OUT_OF_RANGE = np.where(IDS == 3, 19, IDS).astype(np.uint8)
PROBLEMS = [
    ("undecodable", {"image": encoded(RGB)[:-300]}, "truncated"),
    ("undecodable", {"image": encoded(RGB)[:-8]}, ""),
    ("undecodable", {"image": encoded(RGB, "JPEG")[:-50]}, "truncated"),
    ("undecodable", {"image": b""}, "empty"),
    ("undecodable", {"image": b"<html>not found</html>"}, "not an image"),
    ("undecodable", {"mask": encoded(IDS)[:-100]}, "truncated"),
    ("undecodable", {"mask": flipped_bit(encoded(IDS))}, ""),
    ("size_mismatch", {"mask": encoded(IDS[:20])}, "image 32x24, mask 32x20"),
    ("label_out_of_range", {"mask": encoded(OUT_OF_RANGE)}, "holds 19; allowed are 0..18 and 255"),
    ("label_out_of_range", {"mask": encoded(np.arange(768).astype(np.uint8).reshape(SIZE))}, "from 19 to 254"),
    ("mask_not_index", {"mask": encoded(RGB)}, "mode rgb"),
    ("mask_not_index", {"mask": encoded(IDS, "JPEG")}, "a jpeg file"),
    ("mask_not_index", {"mask": encoded(IDS.astype(np.uint16))}, "i;16"),
    ("mask_empty", {"mask": encoded(np.full(SIZE, 255, np.uint8))}, "255"),
]


@pytest.mark.parametrize(("kind", "files", "detail"), PROBLEMS, ids=[f"{p[0]} {i}" for i, p in enumerate(PROBLEMS)])
def test_names_the_problem_and_the_file(tmp_path, kind, files, detail):
    problem = prepared(tmp_path, **files)
    assert isinstance(problem, Problem) and problem.kind == kind and detail in problem.detail.lower()
    at_fault = "a_seg.png" if "mask" in files else "a.png"
    assert problem.file == str(tmp_path / at_fault) and "\n" not in problem.detail and "0x" not in problem.detail
