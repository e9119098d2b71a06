"""Strict decoders: what was encoded comes back, and what was damaged raises."""

import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
import qoi
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from data.codecs import (
    PNG_SIGNATURE,
    decode_image,
    decode_mask,
    encode_jpeg,
    encode_mask,
    encode_png,
    encode_qoi,
    png_chunks,
    png_header,
)
from tests.raw_faces import SIZE, encoded, smooth

RGB = smooth(np.random.default_rng(0))
IDS = np.random.default_rng(1).integers(0, 19, SIZE, np.uint8)
SIDES = st.integers(1, 40)
MASKS = st.tuples(SIDES, SIDES).flatmap(lambda shape: arrays(np.uint8, shape))


@given(MASKS)
@settings(max_examples=60)
def test_any_mask_survives_and_any_reader_reads_it(mask):
    content = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(content), mask)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED), mask)
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(content))), mask)
    np.testing.assert_array_equal(decode_mask(encoded(mask)), mask)  # filtered rows, of other encoders


@given(st.tuples(SIDES, SIDES, st.just(3)).flatmap(lambda shape: arrays(np.uint8, shape)))
@settings(max_examples=60)
def test_any_image_survives_the_lossless_codecs(image):
    for content in (encode_qoi(image), encode_png(image), encoded(image)):
        np.testing.assert_array_equal(decode_image(content), image)


def test_jpeg_keeps_colours_at_full_resolution():
    content = encode_jpeg(RGB, 95)
    assert simplejpeg.decode_jpeg_header(content) == (*SIZE, "YCbCr", "444")
    assert np.abs(decode_image(content).astype(int) - RGB).mean() < 2
    assert len(encode_jpeg(RGB, 60)) < len(content)


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_only_jpegs_are_shrunk(shrink):
    image = np.zeros((33, 50, 3), np.uint8)
    assert decode_image(encode_jpeg(image, 90), shrink).shape == (-(-33 // shrink), -(-50 // shrink), 3)
    assert decode_image(encode_qoi(image), shrink).shape == decode_image(encode_png(image), shrink).shape == (33, 50, 3)


FILES = {
    "rgb png": (encoded(RGB), decode_image),
    "gray png": (encoded(IDS), decode_mask),
    "mask": (encode_mask(IDS), decode_mask),
    "qoi": (encode_qoi(RGB), decode_image),
    "jpeg": (encode_jpeg(RGB, 90), decode_image),
}


@pytest.mark.parametrize("name", FILES)
def test_truncated_files_raise(name):
    content, decode = FILES[name]
    for length in range(0, len(content) - 4, 3):  # of a PNG's last four bytes, a checksum of nothing, all may be lost
        with pytest.raises(ValueError):
            decode(content[:length])


@pytest.mark.parametrize("name", ["rgb png", "gray png", "mask"])
def test_no_flipped_bit_changes_a_png(name):
    content, decode = FILES[name]
    sound, raised = decode(content), 0
    for bit in range(0, 8 * len(content), 5):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(decode(bytes(damaged)), sound)
        except ValueError:
            raised += 1
    assert raised > 0.9 * len(range(0, 8 * len(content), 5))


def png(width: int, height: int, depth: int, color_type: int, rows: bytes) -> bytes:
    """A PNG of sound checksums, whatever it holds."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


OTHERS = {
    "nothing": b"",
    "text": b"<html>not found</html>" * 3,
    "gif": encoded(IDS, "GIF"),
    "rgba png": encoded(np.dstack([RGB, RGB[..., :1]])),
    "rgb png of 16 bits": cv2.imencode(".png", RGB.astype(np.uint16))[1].tobytes(),
    "gray png of 16 bits": encoded(IDS.astype(np.uint16)),
    "palette png": encoded(Image.fromarray(RGB).quantize(16)),
    "rgba qoi": qoi.encode(np.dstack([RGB, RGB[..., :1]])),
    "no pixels": png(0, 5, 8, 0, b""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_raise(name):
    for decode in (decode_image, decode_mask):
        with pytest.raises(ValueError):
            decode(OTHERS[name])


def test_a_header_alone_allocates_no_memory():
    with pytest.raises(ValueError, match="too large"):
        decode_image(png(2**16, 2**15, 8, 2, b"0"))
    with pytest.raises(ValueError, match="too large"):
        decode_mask(png(2**31 - 1, 2**31 - 1, 8, 0, b"0"))


def test_images_and_masks_are_not_taken_for_each_other():
    with pytest.raises(ValueError, match="colour type 2"):
        decode_mask(encoded(RGB))
    with pytest.raises(ValueError, match="colour type 0"):
        decode_image(encode_mask(IDS))


def test_looks_into_a_png_without_decoding_it():
    content = encoded(IDS, transparency=3)
    assert png_header(content) == (SIZE[1], SIZE[0], 8, 0)
    assert png_chunks(content) == {b"IHDR", b"tRNS", b"IDAT", b"IEND"}
    assert png_header(encode_qoi(RGB)) is None
