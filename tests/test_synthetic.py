"""The drawn faces: layout, determinism, labels, and the left/right rule, measured on the pixels."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from data import DataError, synthetic
from data.synthetic import IGNORE, SIDES, Face, Pose, draw_face, draw_person, write_dataset

LABEL_SET = yaml.safe_load((Path(synthetic.__file__).parent / "label_sets" / "face19.yaml").read_text())
SIZE, DRAWS = 64, 240


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    return np.stack([draw_face(0, index, SIZE)[1] for index in range(DRAWS)])


def centre(mask: np.ndarray, label: int) -> np.ndarray:
    """x, y of the label's pixels, NaN where fewer than 8."""
    rows, columns = np.nonzero(mask == label)
    return np.array([columns.mean(), rows.mean()]) if len(rows) >= 8 else np.full(2, np.nan)


def upright(**angles: float) -> Pose:
    return Pose(**({"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "x": 0.5, "y": 0.5, "unit": 0.3} | angles))


def test_names_and_flip_pairs_are_those_of_the_label_set() -> None:
    assert {label.name: int(label) for label in Face} == {c["name"].upper(): c["id"] for c in LABEL_SET["classes"]}
    swapped = {(label, int(other)) for label, other in enumerate(synthetic.MIRRORED) if label < other}
    assert swapped == {tuple(pair) for pair in LABEL_SET["flip_pairs"]}
    assert IGNORE == LABEL_SET["ignore_index"]


def test_a_picture_is_a_pure_function_of_seed_index_and_size() -> None:
    image, mask = draw_face(3, 7, 96)
    assert image.shape == (96, 96, 3) and mask.shape == (96, 96) and image.dtype == mask.dtype == np.uint8
    again = draw_face(3, 7, 96)
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(mask, again[1])
    for other in (draw_face(4, 7, 96), draw_face(3, 8, 96)):
        assert (other[0] != image).mean() > 0.5 and (other[1] != mask).mean() > 0.01


def test_command_line_writes_the_layout_and_the_same_bytes_as_the_function(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data.synthetic", "--out", tmp_path / "a", "--count", "3", "--size", "48"]
    subprocess.run([*command, "--seed", "5"], check=True, cwd=Path(synthetic.__file__).parents[1])
    write_dataset(tmp_path / "b", count=3, seed=5, size=48, workers=1)
    write_dataset(tmp_path / "b", count=3, seed=5, size=48, workers=3)  # over the first
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"{index:06d}{end}.png" for index in range(3) for end in ("", "_seg")]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    for index in range(3):
        image, mask = (Image.open(tmp_path / "a" / f"{index:06d}{end}.png") for end in ("", "_seg"))
        assert (image.mode, mask.mode) == ("RGB", "L")
        for written, drawn in zip((image, mask), draw_face(5, index, 48), strict=True):
            np.testing.assert_array_equal(np.asarray(written), drawn)


def test_bad_arguments_are_told_in_one_line(tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.touch()
    bad = (tmp_path, 0, 64, "--count 0"), (tmp_path, 1, 8, "--size 8"), (a_file, 1, 64, "--out")
    for root, count, size, key in bad:
        with pytest.raises(DataError, match=f"{root}.*{key}") as error:
            write_dataset(root, count, size=size)
        assert "\n" not in str(error.value)


def test_every_class_is_drawn_often_enough_to_be_learned(masks: np.ndarray) -> None:
    assert set(np.unique(masks)) == {*range(19), IGNORE}
    share = {label: (masks == label).any(axis=(1, 2)).mean() for label in Face}
    for label, low, high in ((Face.GLASSES, 0.2, 0.35), (Face.HEADWEAR, 0.2, 0.37), (Face.BEARD, 0.25, 0.42),
                             (Face.FACEWEAR, 0.02, 0.11), (Face.MOUTH_INTERIOR, 0.4, 0.75), (Face.HAIR, 0.8, 0.98)):
        assert low < share[label] < high, label.name
    for _, *labels in SIDES:
        assert min(share[label] for label in labels) > 0.6
    assert 0.25 < (masks != Face.BACKGROUND).mean() < 0.55  # the person fills a good part of the picture


def test_ignored_specks_are_tiny_and_in_about_six_masks_of_ten(masks: np.ndarray) -> None:
    specks = (masks == IGNORE).sum(axis=(1, 2))
    assert 0.5 < (specks > 0).mean() < 0.75
    assert specks.max() <= 20


def test_left_is_the_image_left_of_the_face(masks: np.ndarray) -> None:
    """No drawn head tilts by more than 35 degrees, so here the order along x is the order along the face."""
    pairs = list(zip(SIDES[0][1:], SIDES[1][1:], strict=True))
    gaps = np.array([[centre(mask, right)[0] - centre(mask, left)[0] for left, right in pairs] for mask in masks])
    assert (np.isfinite(gaps).mean(axis=0) > 0.3).all()
    assert not (gaps <= 0).any()


def test_a_turned_head_shows_its_near_ear() -> None:
    ears = {yaw: np.zeros(2) for yaw in (-0.8, 0.8)}
    for index in range(30):
        for yaw in ears:
            mask = draw_person(np.random.default_rng(index), upright(yaw=yaw), SIZE)[1]
            ears[yaw] += [(mask == Face.LEFT_EAR).sum(), (mask == Face.RIGHT_EAR).sum()]
    (left, far_right), (far_left, right) = ears[0.8], ears[-0.8]  # the nose points away from the near ear
    assert left > 5 * far_right and right > 5 * far_left


@pytest.mark.parametrize("roll", [30, -30, 120, 180])
def test_labels_turn_with_the_head(roll: float) -> None:
    """The same person, tilted and then turned back as a picture, has every feature where the upright one has it.

    At 120 and 180 degrees the left eye lies at image-right: labels sorted by x would fail."""
    features = [label for _, *labels in SIDES for label in labels] + [Face.NOSE, Face.TOP_LIP]
    turn, distances = cv2.getRotationMatrix2D((47.5, 47.5), roll, 1), []
    for index in range(20):
        plain, tilted = (draw_person(np.random.default_rng(index), upright(yaw=0.3, roll=angle), 96)[1]
                         for angle in (0, np.radians(roll)))
        back = cv2.warpAffine(tilted, turn, (96, 96), flags=cv2.INTER_NEAREST)
        distances += [np.linalg.norm(centre(plain, label) - centre(back, label)) for label in features]
    distances = np.array(distances)[np.isfinite(distances)]
    assert len(distances) > 100 and (distances < 1.5).mean() > 0.95


def test_a_mirrored_picture_is_as_likely(masks: np.ndarray) -> None:
    """Left and right parts differ in frequency and area by no more than chance (4 standard errors)."""
    for left, right in zip(SIDES[0][1:], SIDES[1][1:], strict=True):
        areas = [(masks == label).sum(axis=(1, 2)).astype(float) for label in (left, right)]
        for difference in (areas[0] - areas[1], (areas[0] > 0) * 1.0 - (areas[1] > 0)):
            assert abs(difference.mean()) <= 4 * difference.std() / DRAWS**0.5, left.name
    columns = np.arange(SIZE) - (SIZE - 1) / 2
    for label in Face:  # nor does any class that has no partner lean to one side
        if label in synthetic.MIRRORED[synthetic.MIRRORED == np.arange(19)]:
            moment = (masks == label).sum(axis=1) @ columns
            assert abs(moment.mean()) < 4 * moment.std() / DRAWS**0.5, label.name


def test_image_and_mask_are_aligned() -> None:
    """The image changes most across the borders of its mask: any shift of the mask makes the borders fainter."""
    steps = {shift: 0.0 for shift in (-2, -1, 0, 1, 2)}
    for index in range(30):
        image, mask = draw_person(np.random.default_rng(index), upright(), 96)
        change = np.abs(np.diff(image.astype(float).sum(axis=2), axis=1))
        border = np.diff((mask == Face.BACKGROUND).astype(int), axis=1) != 0
        for shift in steps:
            steps[shift] += change[np.roll(border, shift, axis=1)].mean()
    assert max(steps, key=steps.get) == 0
    assert abs(steps[1] - steps[-1]) < 0.15 * steps[0]
