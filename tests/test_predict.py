"""The command, from files of all sorts to pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import ModelError
from model.inference import Predictor
from model.predict import main
from model.weight_files import save_safetensors
from tests.conftest import python
from tests.model_cases import METADATA
from tests.raw_faces import encoded
from tests.test_inference import COLORS, LABELS, MODEL, SIZE, masks, photo, probabilities
from tests.test_prepare import oriented


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    own = {"image_size": list(SIZE), "label_set": LABELS.to_dict(), "keep_aspect": True}
    save_safetensors(path, MODEL.state_dict(), METADATA | own)
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_folder_of_all_sorts(tmp_path, weights):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "out"
    (photos / "sub").mkdir(parents=True)
    image = photo(90, 70)
    files = {
        "a.jpg": encoded(image, "JPEG", quality=95),
        "a.png": encoded(image),
        "lying.png": encoded(np.rot90(image).copy(), exif=oriented(6)),  # the camera had been turned
        "half.jpg": encoded(image, "JPEG")[:700],
        "sub/gray [1].png": encoded(image[..., 0].copy()),
        "sub/broken.png": b"",
        "notes.txt": b"hello",
    }
    for name, content in files.items():
        (photos / name).write_bytes(content)
    command = ["-m", "model.predict", "--weights", weights, "--input", photos, "--output", out, "--batch-size", 3]
    done = python(*command, "--flip", "--foreground", "--probabilities")
    assert done.returncode == 1 and "4 of 6 images predicted" in done.stdout, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("skipped ")]
    assert len(told) == 2 and f"{photos / 'half.jpg'}: " in told[0] and "broken.png: an empty file" in told[1]
    assert f"note: {out} lies inside {photos}" in done.stderr and "Traceback" not in done.stderr

    names = ["a.jpg", "a.png", "lying", "sub/gray [1]"]
    kinds = [("mask", ".png"), ("overlay", ".jpg"), ("foreground", ".png"), ("probabilities", ".npz")]
    written = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert written == {f"{kind}/{name}{suffix}" for kind, suffix in kinds for name in names} | {"classes.json"}
    classes = json.loads((out / "classes.json").read_text())["classes"]
    assert classes[2] == {"id": 2, "name": "left eye", "color": [0, 250, 0]}

    predictor = Predictor(MODEL, keep_aspect=True, flip_pairs=LABELS.flip_pairs)
    expected = masks(predictor, [image])[0]
    mask = Image.open(out / "mask" / "a.png.png")
    assert mask.mode == "P" and mask.getpalette()[:15] == list(np.ravel(COLORS))
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(pixels(out / "mask" / "lying.png"), pixels(out / "mask" / "a.png.png"))
    np.testing.assert_array_equal(pixels(out / "foreground" / "a.png.png"), np.where(expected == 0, 0, 255))
    with np.load(out / "probabilities" / "a.png.npz") as file:
        found = file["probabilities"]
    assert found.dtype == np.float16 and found.shape == (5, 90, 70)
    np.testing.assert_allclose(found, probabilities(predictor, image), atol=2e-3)
    tinted = np.where(expected[..., None] > 0, image / 2 + np.uint8(COLORS)[expected] / 2, image)
    assert np.abs(pixels(out / "overlay" / "a.png.jpg") - tinted).mean() < 12

    (out / "mask" / "lying.png").write_bytes(b"old")
    again = [str(argument) for argument in command[2:]]
    assert main(again) == 1
    assert pixels(out / "mask" / "lying.png").shape == (90, 70)
    assert len(list((out / "mask").rglob("*"))) == 5  # four masks and a folder: results are no images


def test_a_model_without_label_set(tmp_path, capsys):
    bare = tmp_path / "bare.safetensors"
    save_safetensors(bare, MODEL.state_dict(), METADATA | {"image_size": list(SIZE)})
    (tmp_path / "a.jpg").write_bytes(encoded(photo(91, 37), "JPEG"))
    arguments = ["--weights", str(bare), "--input", str(tmp_path / "a.jpg"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0 and "1 of 1 images" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "mask" / "a.png").size == (37, 91)
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())["classes"]
    assert classes[3]["name"] == "class 3" and len({tuple(entry["color"]) for entry in classes}) == 5
    with pytest.raises(ModelError, match="bare.safetensors: label_set: tells no flip_pairs"):
        main([*arguments, "--flip"])


def test_what_is_refused(tmp_path, weights, capsys):
    (tmp_path / "a.jpg").write_bytes(encoded(photo(91, 37), "JPEG"))
    command = ["--weights", str(weights), "--input", str(tmp_path), "--output"]
    (tmp_path / "mine" / "mask").mkdir(parents=True)
    with pytest.raises(ModelError, match="mine: has a folder 'mask' that no prediction wrote"):
        main([*command, str(tmp_path / "mine")])
    with pytest.raises(ModelError, match="--device nonsense"):
        main([*command, str(tmp_path / "out"), "--device", "nonsense"])
    with pytest.raises(SystemExit):
        main([*command, str(tmp_path / "out"), "--window", "0.5"])
    for number in ("0", "-3", "some"):
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path / "out"), "--batch-size", number])
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith(f"argument --batch-size: {number} must be a whole number, at least 1")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/classes.json: cannot be written"):
        main([*command, str(tmp_path / "file")])
    done = python("-m", "model.predict", "--weights", weights, "--input", tmp_path / "*.png", "--output", tmp_path / "out")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "no image there" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
