"""Files to pixels: which are taken, what they are called, and that they are read as the packing reads them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.raw_files import read_image as read_packed
from model import ModelError
from model.images import UnreadableImage, find_images, read_image, save
from tests.raw_faces import encoded
from tests.test_prepare import GRAY, NOISE, RGB, oriented
from tests.test_raw_files import CONVERTED, KEPT

FILES = {
    **KEPT,
    **{name: content for name, (content, _) in CONVERTED.items()},
    "cmyk": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "gray jpeg": encoded(GRAY, "JPEG"),
    "gray 16, lower bytes 0": encoded(GRAY.astype(np.uint16) << 8),
}


@pytest.mark.parametrize("name", FILES)
def test_images_are_read_as_they_are_packed(tmp_path, name):
    (tmp_path / "a").write_bytes(FILES[name])
    np.testing.assert_array_equal(read_image(tmp_path / "a"), read_packed(tmp_path / "a").pixels)


@pytest.mark.parametrize("tag", range(2, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_images_are_turned_upright(tmp_path, format, tag):
    (tmp_path / "a").write_bytes(encoded(RGB, format, exif=oriented(tag)))
    np.testing.assert_array_equal(read_image(tmp_path / "a"), read_packed(tmp_path / "a").pixels)
    assert read_image(tmp_path / "a").shape == ((32, 24, 3) if tag >= 5 else (24, 32, 3))


def damaged(format: str) -> bytes:
    content = bytearray(encoded(np.tile(NOISE, (2, 2, 1)), format))
    at = len(content) * 3 // 4
    content[at : at + 4] = b"\xff\xd0\x12\x34"
    return bytes(content)


BAD = {
    "nothing": (b"", "an empty file"),
    "text": (b"hello", "not an image"),
    "half a png": (encoded(NOISE)[:600], None),
    "half a jpeg": (encoded(NOISE, "JPEG")[:600], None),
    "damaged png": (damaged("PNG"), None),
    "damaged jpeg": (damaged("JPEG"), None),
    "wrong checksum": (encoded(RGB)[:-13] + bytes([encoded(RGB)[-13] ^ 1]) + encoded(RGB)[-12:], None),
    "black": (encoded(GRAY.astype(np.uint16)), "8-bit RGB"),
    "not colours": (encoded(GRAY.astype(np.float32), "TIFF"), "floating point"),
    "huge": (b"P6\n60000 60000\n255\n", "pixels"),
}


@pytest.mark.parametrize("name", BAD)
def test_unreadable_images_are_told_why_in_a_line(tmp_path, name):
    (tmp_path / "a").write_bytes(BAD[name][0])
    with pytest.raises(UnreadableImage, match=BAD[name][1]) as error:
        read_image(tmp_path / "a")
    assert str(error.value) and "\n" not in str(error.value)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def test_folders_are_searched_and_names_kept(tmp_path):
    touch(tmp_path, "a.jpg", "sub/a.JPG", "sub/deep/b.c.png", "notes.txt", ".hidden.jpg", ".cache/a.jpg", "out/mask/a.png")
    names = find_images([str(tmp_path)], without=[tmp_path / "out" / "mask"])
    assert {str(path.relative_to(tmp_path)): str(name) for path, name in names.items()} == {
        "a.jpg": "a", "sub/a.JPG": "sub/a", "sub/deep/b.c.png": "sub/deep/b.c",
    }  # fmt: skip


def test_names_that_differ_in_their_suffix_keep_it(tmp_path):
    touch(tmp_path, "a.jpg", "a.png", "a.jpg.png", "b.png", "sub/a.png")
    names = [str(name) for name in find_images([str(tmp_path)]).values()]
    assert sorted(names) == ["a.jpg", "a.jpg.png", "a.png", "b", "sub/a"]


def test_files_patterns_and_several_inputs(tmp_path, monkeypatch):
    touch(tmp_path, "x/face [1].jpg", "x/b.png", "y/b.png", "y/c.txt", "y/deep/d.jpg", "odd")
    monkeypatch.chdir(tmp_path)

    def found(*inputs: str) -> list[str]:
        return [str(name) for name in find_images(inputs).values()]

    assert found("x/face [1].jpg") == ["face [1]"]
    assert found("odd") == ["odd"]
    assert found("x/*.jpg") == ["face [1]"] and found("?/*.png") == ["x/b", "y/b"]
    assert found("y/**/*.jpg") == ["deep/d"]
    assert found("x/b.png", "y", "x/b.png") == ["x/b", "y/b", "y/deep/d"]
    for nothing in ("z", "y/*.txt", "x/*.gif"):
        with pytest.raises(ModelError, match="no image there"):
            find_images(["x", nothing])


def test_a_file_that_could_not_be_written_is_as_it_was(tmp_path):
    def fail(file) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    save(tmp_path / "sub" / "a", lambda file: file.write(b"whole"))
    with pytest.raises(OSError, match=r"sub/a: cannot be written \(No space left on device\)"):
        save(tmp_path / "sub" / "a", fail)
    assert [path.read_bytes() for path in (tmp_path / "sub").iterdir()] == [b"whole"]
