"""Raw files of every kind, as they are packed: odd ones are brought into one form, plain ones keep their bytes."""

import struct
import zlib
from io import BytesIO

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from data.codecs import decode_image, decode_mask, encode_mask
from tests.raw_faces import encoded
from tests.test_prepare import ALPHA, GRAY, IDS, RGB, gray3, oriented, prepared

PALETTE = Image.fromarray(RGB).quantize(200)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png: bytes, name: bytes, data: bytes, last: bool = False) -> bytes:
    place = len(png) - 12 if last else 33  # before IEND, or behind IHDR
    return png[:place] + chunk(name, data) + png[place:]


def gray_png(ids: np.ndarray, bits: int, interlaced: bool = False) -> bytes:
    """A gray PNG written chunk by chunk: neither Pillow nor cv2 writes 2 or 4 bits, or interlaced ones."""
    passes = [ids]
    if interlaced:
        starts = (0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)
        passes = [ids[y::dy, x::dx] for y, x, dy, dx in starts]
    rows = b""
    for row in (row for part in passes for row in part):
        pixels = np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]
        rows += b"\0" + np.packbits(pixels.ravel()).tobytes()
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


KEPT = {
    "png": encoded(RGB),
    "jpeg": encoded(RGB, "JPEG"),
    "upright by exif": encoded(RGB, "JPEG", exif=oriented(1)),
    "no such orientation": encoded(RGB, "JPEG", exif=oriented(9)),
    "malformed exif": encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"),
    "malformed exif in png": with_chunk(encoded(RGB), b"eXIf", b"junk"),
    "gamma": with_chunk(encoded(RGB), b"gAMA", struct.pack(">I", 22222)),
    "trailing data": encoded(RGB) + b"\0" * 100,
    "trailing data in jpeg": encoded(RGB, "JPEG") + b"\0" * 100,
}


@pytest.mark.parametrize("name", KEPT)
def test_plain_images_keep_their_bytes(tmp_path, name):
    sample = prepared(tmp_path, KEPT[name])
    assert sample.image_bytes == KEPT[name] and sample.notes == ()
    assert sample.image_suffix == ("png" if KEPT[name][1:4] == b"PNG" else "jpg")
    np.testing.assert_array_equal(decode_image(sample.image_bytes), np.asarray(Image.open(BytesIO(KEPT[name]))))


CONVERTED = {
    "gray": (encoded(GRAY), gray3(GRAY)),
    "gray 4 bit": (gray_png(IDS, 4), gray3(IDS * 17)),
    "gray 16": (encoded(GRAY.astype(np.uint16) * 257), gray3(GRAY)),
    "gray 16 pgm": (b"P5\n32 24\n65535\n" + (GRAY.astype(np.uint16) * 257).astype(">u2").tobytes(), gray3(GRAY)),
    "rgb 16": (cv2.imencode(".png", RGB[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), RGB),
    "1 bit": (encoded(Image.fromarray(ALPHA).convert("1")), gray3(ALPHA)),
    "palette": (encoded(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette with a transparent colour": (
        encoded(PALETTE, transparency=7),
        np.asarray(PALETTE.convert("RGB")) * (np.asarray(PALETTE) != 7)[..., None],
    ),
    "alpha": (encoded(np.dstack([RGB, ALPHA])), RGB * (ALPHA[..., None] > 0)),
    "gray and alpha": (encoded(np.dstack([GRAY, ALPHA])), gray3(GRAY * (ALPHA > 0))),
    "transparent colour": (encoded(RGB, transparency=(1, 2, 3)), RGB),
    "webp": (encoded(RGB, "WEBP", lossless=True), RGB),
    "bmp": (encoded(RGB, "BMP"), RGB),
    "tiff": (encoded(RGB, "TIFF"), RGB),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_other_images_become_rgb_png(tmp_path, name):
    image, expected = CONVERTED[name]
    sample = prepared(tmp_path, image)
    assert sample.image_suffix == "png" and sample.notes == ("image_converted",)
    np.testing.assert_array_equal(decode_image(sample.image_bytes), expected)


def test_jpegs_of_other_colours_become_rgb_png(tmp_path):
    for image in (encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), encoded(GRAY, "JPEG", quality=95)):
        sample = prepared(tmp_path, image)
        expected = np.asarray(Image.open(BytesIO(image)).convert("RGB")).astype(int)
        assert sample.image_suffix == "png" and sample.notes == ("image_converted",)
        assert np.abs(decode_image(sample.image_bytes) - expected).max() <= 1


@pytest.mark.parametrize("tag", range(2, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_turned_upright(tmp_path, format, tag):
    image = encoded(RGB, format, exif=oriented(tag), **{"lossless": True} if format == "WEBP" else {})
    expected = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(image))))
    sample = prepared(tmp_path, image, encoded(np.ascontiguousarray(IDS.T)) if tag >= 5 else encoded(IDS))
    assert "exif_applied" in sample.notes and (sample.height, sample.width) == expected.shape[:2]
    assert np.abs(decode_image(sample.image_bytes).astype(int) - expected).max() <= (format == "JPEG")


def test_exif_is_found_behind_the_pixels_and_in_xmp(tmp_path):
    half_turn = oriented(3).tobytes().removeprefix(b"Exif\0\0")
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="3"/></x:xmpmeta>'
    for image in (with_chunk(encoded(RGB), b"eXIf", half_turn, last=True), with_chunk(encoded(RGB), b"iTXt", xmp)):
        sample = prepared(tmp_path, image)
        assert sample.notes == ("exif_applied",)
        np.testing.assert_array_equal(decode_image(sample.image_bytes), RGB[::-1, ::-1])


def palette_mask(**options) -> bytes:
    mask = Image.frombytes("P", IDS.shape[::-1], IDS.tobytes())
    mask.putpalette(np.random.default_rng(3).integers(0, 256, 768).astype(np.uint8).tobytes())
    return encoded(mask, **options)


MASKS = {
    "gray": (encoded(IDS), IDS, True),
    "unfiltered": (encode_mask(IDS), IDS, True),
    "interlaced": (gray_png(IDS, 8, interlaced=True), IDS, True),
    "gamma": (with_chunk(encoded(IDS), b"gAMA", struct.pack(">I", 22222)), IDS, True),
    "colour profile": (encoded(IDS, icc_profile=b"\0" * 200), IDS, True),
    "trailing data": (encoded(IDS) + b"\0" * 9, IDS, True),
    "palette": (palette_mask(), IDS, False),
    "transparent palette": (palette_mask(transparency=3), IDS, False),
    "palette of 2 bits": (palette_mask(bits=4), IDS, False),
    "4 bit": (gray_png(IDS, 4), IDS, False),
    "2 bit": (gray_png(IDS % 4, 2), IDS % 4, False),
    "1 bit": (encoded(Image.fromarray((IDS % 2) * 255).convert("1")), IDS % 2, False),
    "a transparent colour": (encoded(IDS, transparency=0), IDS, False),
    "half turn": (encoded(IDS[::-1, ::-1].copy(), exif=oriented(3)), IDS, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_stored_as_gray_class_ids(tmp_path, name):
    mask, ids, kept = MASKS[name]
    sample = prepared(tmp_path, mask=mask)
    assert (sample.mask_bytes == mask) is kept
    np.testing.assert_array_equal(decode_mask(sample.mask_bytes), ids)
    np.testing.assert_array_equal(cv2.imdecode(np.frombuffer(sample.mask_bytes, np.uint8), -1), ids)
    assert sample.pixel_counts == tuple(np.bincount(ids.ravel(), minlength=19))
