"""Bytes to pixels and back, by the fastest strict decoder that we know for each format.

Strict: damaged bytes raise. OpenCV would return a half grey picture without a word, so it decodes nothing here.
"""

import struct
import zlib

import cv2
import deflate
import kornia_rs
import numpy as np
import qoi
import simplejpeg

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB = 0, 2  # colour types of a PNG
COMPRESSION = 8  # of libdeflate, whose highest, 12, costs twenty times the time for a few per cent
PREFIX = len(PNG_SIGNATURE) + 25 + 8  # signature, IHDR, length and name of the IDAT that follows it
SUFFIX = 4 + 12  # the IDAT's checksum, IEND
MAX_PIXELS = 2**28  # decoders allocate what the header asks for before they look at the rest


def decode_image(content: bytes, shrink: int = 1) -> np.ndarray:
    """RGB uint8 (h, w, 3) of an 8-bit RGB PNG, a JPEG or a QOI file, as stored: EXIF is not looked at.

    Args:
        shrink: 1, 2, 4 or 8: the largest factor by which the result may be smaller. JPEG alone can: it decodes so much
            faster, to ceil(h / shrink) x ceil(w / shrink), each pixel an average.

    Raises:
        ValueError: damaged, or another kind of file.
    """
    if content.startswith(b"\xff\xd8"):
        least = {}
        if shrink > 1:
            height, width = simplejpeg.decode_jpeg_header(content)[:2]
            least = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)}
        return simplejpeg.decode_jpeg(content, "RGB", **least)
    if content.startswith(b"qoif"):
        try:
            image = np.asarray(qoi.decode(content))
        except RuntimeError as error:
            raise ValueError(str(error)) from None
        if image.shape[2] != 3:
            raise ValueError(f"a QOI file of {image.shape[2]} channels, not 3")
        return image
    return _decode_png(content, RGB)


def decode_mask(content: bytes) -> np.ndarray:
    """Class ids uint8 (h, w) of an 8-bit single-channel PNG.

    Raises:
        ValueError: damaged, or another kind of file.
    """
    if (mask := _decode_unfiltered(content)) is not None:
        return mask
    return _decode_png(content, GRAY)


def encode_mask(mask: np.ndarray) -> bytes:
    """uint8 (h, w) as an ordinary PNG whose rows are unfiltered: of flat areas it is smaller than a filtered one, and
    `decode_mask` reads it without undoing filters, 15 times as fast."""
    height, width = mask.shape
    rows = np.zeros((height, width + 1), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = mask
    header = struct.pack(">IIBBBBB", width, height, 8, GRAY, 0, 0, 0)
    data = bytes(deflate.zlib_compress(rows.tobytes(), COMPRESSION))
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def encode_qoi(image: np.ndarray) -> bytes:
    """RGB uint8 (h, w, 3), without loss: a fifth larger than PNG and decoded twice as fast."""
    return qoi.encode(np.ascontiguousarray(image))


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """RGB uint8 (h, w, 3), colours at full resolution (4:4:4), so that the outlines of small parts stay sharp."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, "RGB", "444")


def encode_png(image: np.ndarray) -> bytes:
    """RGB uint8 (h, w, 3)."""
    return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()


def png_header(content: bytes) -> tuple[int, int, int, int] | None:
    """(width, height, bits a channel, colour type) of a PNG file; None for other files."""
    if not content.startswith(PNG_SIGNATURE) or len(content) < 33:
        return None
    return struct.unpack(">IIBB", content[16:26])


def png_chunks(content: bytes) -> set[bytes]:
    """The names of a PNG file's chunks, such as b"eXIf"."""
    names, at = set(), len(PNG_SIGNATURE)
    while at + 8 <= len(content):
        size, name = struct.unpack_from(">I4s", content, at)
        names.add(name)
        at += 12 + size
    return names


def _decode_png(content: bytes, color_type: int) -> np.ndarray:
    header = png_header(content)
    if header is None:
        raise ValueError("neither PNG, JPEG nor QOI")
    width, height, depth, found = header
    if width * height > MAX_PIXELS:
        raise ValueError(f"a damaged PNG, or too large a one: {width}x{height} pixels")
    if (depth, found) != (8, color_type):
        raise ValueError(f"a PNG of {depth} bits and colour type {found}, not 8 bits and {color_type}")
    try:
        pixels = kornia_rs.io.decode_image_png_u8(content, (height, width), "rgb" if color_type == RGB else "mono")
    except Exception as error:  # it names no class of its own
        raise ValueError(" ".join(str(error).split())) from None
    return pixels if color_type == RGB else pixels.reshape(height, width)


def _decode_unfiltered(content: bytes) -> np.ndarray | None:
    """What `encode_mask` and other encoders of that kind wrote, or None: IHDR, one IDAT of unfiltered rows, IEND."""
    header = png_header(content)
    if header is None or header[2:] != (8, GRAY) or content[28] != 0 or content[37:41] != b"IDAT":
        return None
    width, height = header[:2]
    size = struct.unpack(">I", content[33:37])[0]
    if PREFIX + size + SUFFIX != len(content) or width * height > MAX_PIXELS:
        return None
    try:
        rows = np.frombuffer(deflate.zlib_decompress(content[PREFIX : PREFIX + size], height * (width + 1)), np.uint8)
    except deflate.DeflateError:
        return None  # the ordinary decoder says what is wrong
    if rows.size != height * (width + 1) or rows[:: width + 1].any():
        return None
    return np.ascontiguousarray(rows.reshape(height, width + 1)[:, 1:])


def _chunk(name: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(content, zlib.crc32(name)))
    return struct.pack(">I", len(content)) + name + content + checksum
