"""One raw example: odd files are brought into one form, bad ones are named."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data import DataError
from data.codecs import decode_image, decode_mask, encode_jpeg
from data.labels import load_label_set
from data.prepare import KINDS, NOTES, Problem, Rules, prepare
from data.sources import RawExample
from data.tars import PackedSample
from tests.raw_faces import SIZE, encoded, smooth

FACE19 = load_label_set("face19")
RGB = smooth(np.random.default_rng(1))
IDS = np.random.default_rng(2).integers(0, 16, SIZE, np.uint8)
OUT_OF_RANGE = np.where(IDS == 3, 19, IDS).astype(np.uint8)
GRAY = np.ascontiguousarray(RGB[..., 0])
ALPHA = np.where(np.arange(32) < 16, 255, 0).astype(np.uint8) * np.ones(SIZE, np.uint8)
IMAGE, MASK = encoded(RGB), encoded(IDS)
NOISE = np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)


def prepared(folder: Path, image: bytes = IMAGE, mask: bytes = MASK, **rules) -> PackedSample | Problem:
    """`prepare` of a sound example with the given file in place of its own."""
    (folder / "a.png").write_bytes(image)  # the name's ending says nothing about the content
    (folder / "a_seg.png").write_bytes(mask)
    rules = Rules(**{"masks": FACE19, "target": FACE19} | rules)
    return prepare(RawExample("a", folder / "a.png", folder / "a_seg.png"), rules)


def gray3(image: np.ndarray) -> np.ndarray:
    return np.stack([image] * 3, -1)


def oriented(tag: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


@given(st.lists(st.one_of(st.integers(0, 18), st.just(255), st.integers(0, 255)), min_size=1, max_size=4, unique=True))
@settings(max_examples=60)
def test_any_values_are_counted_or_refused(tmp_path_factory, values):
    mask = np.resize(np.array(values, np.uint8), SIZE)
    result = prepared(tmp_path_factory.getbasetemp(), mask=encoded(mask), keep_constant=True)
    strange = [value for value in values if 19 <= value < 255]
    if strange:
        assert result.kind == "label_out_of_range" and all(str(value) in result.detail for value in strange)
    elif values == [255]:
        assert result.kind == "mask_empty"
    else:
        assert result.pixel_counts == tuple(np.count_nonzero(mask == i) for i in range(19))


def flipped_bit(data: bytes) -> bytes:
    damaged = bytearray(data)
    damaged[-20] ^= 1  # in the checksum of the pixels
    return bytes(damaged)


SHADES = replace(FACE19, colors=tuple((i, 2 * i, 255 - i) for i in range(19)))  # face19 has one colour twice
COLORED = SHADES.palette()[IDS]
SOFTENED = COLORED.copy()
SOFTENED[2, 5] = (1, 2, 3)
COLORS = {"mask_colors": True, "masks": SHADES}
PROBLEMS = [
    ("undecodable", {"image": IMAGE[:-300]}, "truncated"),
    ("undecodable", {"image": IMAGE[:-8]}, ""),
    ("undecodable", {"image": flipped_bit(IMAGE)}, ""),
    ("undecodable", {"image": encoded(RGB, "JPEG")[:-50]}, "premature end"),
    ("undecodable", {"image": encoded(GRAY, "JPEG")[:-50]}, "premature end"),
    ("undecodable", {"image": encoded(RGB, "WEBP", lossless=True)[:-50]}, ""),
    ("undecodable", {"image": encoded(RGB, "BMP")[:-50]}, "truncated"),
    ("undecodable", {"image": encoded(GRAY.astype(np.float32), "TIFF")}, "floating point"),
    ("undecodable", {"image": encoded(GRAY.astype(np.int32) - 300, "TIFF")}, "not of 16 bits"),
    ("undecodable", {"image": b""}, "empty"),
    ("undecodable", {"image": b"<html>not found</html>"}, "not an image"),
    ("undecodable", {"mask": MASK[:-100]}, "truncated"),
    ("undecodable", {"mask": flipped_bit(MASK)}, ""),
    ("size_mismatch", {"mask": encoded(IDS[:20])}, "image 32x24, mask 32x20"),
    ("size_mismatch", {"mask": MASK, "image": encoded(RGB, exif=oriented(6))}, "they agree without the image's"),
    ("label_out_of_range", {"mask": encoded(OUT_OF_RANGE)}, "holds 19; allowed are 0..18 and 255"),
    ("label_out_of_range", {"mask": encoded(np.arange(768).astype(np.uint8).reshape(SIZE))}, "from 19 to 254"),
    ("mask_not_index", {"mask": encoded(RGB)}, "mode rgb"),
    ("mask_not_index", {"mask": encoded(np.dstack([IDS, ALPHA]))}, "mode la"),
    ("mask_not_index", {"mask": encoded(IDS, "JPEG")}, "a jpeg file"),
    ("mask_not_index", {"mask": encoded(IDS.astype(np.uint16))}, "i;16"),
    ("mask_not_index", {"mask": MASK} | COLORS, "without --mask-colors"),
    ("mask_not_index", {"mask": encoded(COLORED, "JPEG")} | COLORS, "a jpeg file"),
    ("mask_not_index", {"mask": encoded(np.dstack([COLORED, ALPHA]))} | COLORS, "transparent"),
    ("mask_empty", {"mask": encoded(np.full(SIZE, 255, np.uint8))}, "255"),
    ("mask_empty", {"mask": MASK, "table": np.full(256, 255, np.uint8)}, "255"),
    ("mask_constant", {"mask": encoded(np.full(SIZE, 2, np.uint8))}, "every pixel is 2 (nose)"),
    ("mask_color_unknown", {"mask": encoded(SOFTENED)} | COLORS, "1 of 768 pixels, the first (1, 2, 3) at x=5, y=2"),
]


@pytest.mark.parametrize(("kind", "inputs", "detail"), PROBLEMS, ids=[f"{p[0]} {i}" for i, p in enumerate(PROBLEMS)])
def test_names_the_problem_and_the_file(tmp_path, kind, inputs, detail):
    problem = prepared(tmp_path, **inputs)
    assert isinstance(problem, Problem) and problem.kind == kind and detail in problem.detail.lower()
    at_fault = "a_seg.png" if "mask" in inputs else "a.png"
    assert problem.file == str(tmp_path / at_fault) and "\n" not in problem.detail and "0x" not in problem.detail


def test_missing_files(tmp_path):
    (tmp_path / "a.png").write_bytes(IMAGE)
    rules = Rules(FACE19, FACE19)
    problem = prepare(RawExample("a", tmp_path / "a.png", None), rules)
    assert (problem.kind, problem.file) == ("mask_missing", str(tmp_path / "a.png"))
    problem = prepare(RawExample("a", tmp_path / "a.png", tmp_path / "m" / "b.png"), rules)
    assert (problem.kind, problem.detail) == ("mask_missing", f"no {tmp_path / 'm' / 'b.png'}")
    problem = prepare(RawExample("a", tmp_path / "b.png", tmp_path / "a.png"), rules)
    assert (problem.kind, problem.file, problem.detail) == ("image_missing", str(tmp_path / "a.png"), f"no {tmp_path / 'b.png'}")


def test_every_kind_of_problem_has_a_test():
    assert {kind for kind, *_ in PROBLEMS} | {"image_missing", "mask_missing"} == KINDS.keys()


def test_constant_masks_may_be_meant(tmp_path):
    sample = prepared(tmp_path, mask=encoded(np.full(SIZE, 2, np.uint8)), keep_constant=True)
    assert sample.pixel_counts[2] == IDS.size == sum(sample.pixel_counts)


def test_masks_of_colours_become_class_ids(tmp_path):
    ignored = IDS.copy()
    ignored[:3] = 255
    colored = SHADES.palette()[ignored]
    quantized = Image.fromarray(colored).quantize(64)
    assert (np.asarray(quantized.convert("RGB")) == colored).all()
    opaque = np.dstack([colored, np.full(SIZE, 255, np.uint8)])
    for mask in (colored, quantized, opaque):
        sample = prepared(tmp_path, mask=encoded(mask), **COLORS)
        np.testing.assert_array_equal(decode_mask(sample.mask_bytes), ignored)
    with pytest.raises(DataError, match="share the colour"):
        prepared(tmp_path, mask=encoded(COLORED), mask_colors=True)


def test_a_label_map_changes_ids_and_counts(tmp_path):
    table = np.full(256, 255, np.uint8)
    table[:19] = np.arange(19)[::-1]
    table[5] = 255
    sample = prepared(tmp_path, table=table)
    expected = table[IDS]
    np.testing.assert_array_equal(decode_mask(sample.mask_bytes), expected)
    assert sample.pixel_counts == tuple(np.count_nonzero(expected == i) for i in range(19))


@pytest.mark.parametrize(("encode", "suffix", "loss"), [("keep", "png", 0), ("lossless", "qoi", 0), ("jpeg", "jpg", 2)])
def test_encodes_images_as_told_and_masks_without_loss(tmp_path, encode, suffix, loss):
    sample = prepared(tmp_path, encode=encode)
    assert sample.image_suffix == suffix and sample.notes == ()
    assert np.abs(decode_image(sample.image_bytes).astype(int) - RGB).mean() <= loss
    np.testing.assert_array_equal(decode_mask(sample.mask_bytes), IDS)
    assert (sample.mask_bytes == MASK) is (encode == "keep")


def test_jpegs_are_not_compressed_a_second_time_without_need(tmp_path):
    jpeg = encode_jpeg(NOISE, 80)
    assert prepared(tmp_path, jpeg, encode="jpeg", jpeg_quality=60).image_bytes == jpeg
    turned = prepared(tmp_path, encoded(NOISE, "JPEG", exif=oriented(3)), encode="jpeg", jpeg_quality=60)
    assert turned.image_suffix == "jpg" and len(turned.image_bytes) < len(jpeg)


@pytest.mark.parametrize(("max_side", "size", "notes"), [(32, (24, 32), ()), (8, (6, 8), ("image_shrunk",))])
def test_shrinks_image_and_mask_together(tmp_path, max_side, size, notes):
    ids = np.zeros(SIZE, np.uint8)
    ids[7:, 11:29] = 1
    for encode in ("keep", "lossless", "jpeg"):
        sample = prepared(tmp_path, encoded(gray3(ids * 255)), encoded(ids), max_side=max_side, encode=encode)
        mask, image = decode_mask(sample.mask_bytes), decode_image(sample.image_bytes)
        assert (sample.height, sample.width) == mask.shape == image.shape[:2] == size and sample.notes == notes
        centre = SIZE[1] // size[1] // 2
        np.testing.assert_array_equal(mask, ids[centre :: SIZE[0] // size[0], centre :: SIZE[1] // size[1]])
        assert sample.pixel_counts[1] == mask.sum()
        assert ((image[..., 0] > 127) == mask).mean() > 0.8


def test_explanations_are_one_line_each():
    for text in (*KINDS.values(), *NOTES.values()):
        assert text and "\n" not in text and len(text) <= 110


def test_a_map_of_edges_is_no_mask(tmp_path):
    """Edges drawn as 255 on 0: by its values a mask of background and ignored pixels."""
    edges = np.zeros(SIZE, np.uint8)
    edges[3], edges[:, 5] = 255, 255
    problem = prepared(tmp_path, mask=encoded(edges))
    assert (problem.kind, problem.detail) == ("mask_constant", "every pixel that is not 255 is 0 (Background)")
