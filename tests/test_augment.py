"""What is drawn: views, and their distribution beside that of the independent reference pipeline."""

import cv2
import numpy as np
import pytest
from pydantic import ValidationError

from benchmarks.reference_pipeline import ReferencePipeline
from data.augment import AugmentConfig, draw_view
from tests.views import IGNORE, SIZE, STILL, changed, draw, mapped


def measured(image, label):
    """What `mapped` shows: how it was enlarged, turned, mirrored, stretched; which of its points is in the middle."""
    inside = cv2.erode((label != IGNORE).astype(np.uint8), np.ones((5, 5)), borderValue=0) > 0
    y, x = np.nonzero(inside)
    source = (image[y, x, :2].astype(float) - 20) / 2
    (to_x, to_y, middle), *_ = np.linalg.lstsq(np.stack([x + 0.5 - 24, y + 0.5 - 32, np.ones(len(x))], 1), source)
    flipped = np.linalg.det([to_x, to_y]) < 0
    to_x = -to_x if flipped else to_x
    angle = np.degrees(np.arctan2(to_y[0] - to_x[1], to_x[0] + to_y[1]))
    shown = label[label != IGNORE]
    return {
        "zoom": 1 / np.sqrt(abs(np.linalg.det([to_x, to_y]))),
        "x": middle[0],
        "y": middle[1],
        "angle": angle,
        "flipped": flipped,
        "filled": (label == IGNORE).mean(),
        "largest": np.bincount(shown).max() / len(shown),
        "stretch": np.linalg.cond([to_x, to_y]),
    }


BLUR = {"zoom": 0, "x": 0.5, "y": 0.5, "angle": 1, "flipped": 0, "filled": 0.01, "largest": 0.02, "stretch": 0.02}


def differ(a, b, blur=0.0) -> bool:
    """Two-sample Kolmogorov-Smirnov test at 1 %. Many values may be one, but for measuring: `blur` spreads them."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(np.float64(sample), blur) for sample in (a, b))
    values = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (a, b)]
    return np.abs(shares[0] - shares[1]).max() > 1.63 * np.sqrt(1 / len(a) + 1 / len(b))


def test_views_are_distributed_as_the_references():
    image, label = mapped()
    reference = ReferencePipeline(SIZE, photometric=False, seed=1)
    theirs = [reference(image, label) for _ in range(500)]
    theirs = [measured(image.transpose(1, 2, 0), label[0]) for image, label in theirs]
    config = AugmentConfig(photometric=False, keep_aspect=False)
    ours = [measured(*draw(image, label, config, seed)) for seed in range(500)]
    for name, blur in BLUR.items():
        assert not differ(*([row[name] for row in rows] for rows in (ours, theirs)), blur), name
    wrong = [measured(*draw(image, label, changed(config, scale=(0.2, 2.3)), seed)) for seed in range(500)]
    assert differ([row["zoom"] for row in wrong], [row["zoom"] for row in theirs])  # the test can tell


def test_colours_are_distributed_as_the_references():
    image, label = np.full((8, 6, 3), (90, 120, 170), np.uint8), np.zeros((8, 6), np.uint8)
    reference = ReferencePipeline((8, 6), seed=2)
    theirs = np.array([reference.photometric_distortion(image)[0, 0] for _ in range(1000)]).astype(int)
    config = changed(STILL, photometric=True)
    ours = np.array([draw(image, label, config, seed, (8, 6))[0][0, 0] for seed in range(1000)]).astype(int)
    for channel in range(3):
        assert not differ(ours[:, channel], theirs[:, channel])
    assert not differ(np.ptp(ours, axis=1), np.ptp(theirs, axis=1))


@pytest.mark.parametrize("shape", [(100, 80), (60, 120), (120, 60), (7, 400)])
def test_keep_aspect_keeps_it_to_a_pixel_of_the_source(shape):
    label = np.zeros(shape, np.uint8)
    for seed in range(60):
        view = draw_view(label, SIZE, AugmentConfig(), np.random.default_rng(seed))
        zoom = view.place.width / view.box.width, view.place.height / view.box.height
        error = view.unit / min(view.box[2:]) + 1 / min(view.place[2:])
        assert np.log(zoom[0] / zoom[1]) == pytest.approx(0, abs=error)
        stretched = draw_view(label, SIZE, AugmentConfig(keep_aspect=False), np.random.default_rng(seed))
        assert stretched.place == (0, 0, SIZE[1], SIZE[0])


def test_shapes_are_kept_in_the_pixels_too():
    image, label = mapped(60, 120)
    for keep_aspect, least, most in ((True, 1.0, 1.05), (False, 1.5, 9.0)):
        config = changed(STILL, scale=(0.5, 0.9), rotate_probability=0.5, keep_aspect=keep_aspect)
        stretches = [measured(*draw(image, label, config, seed))["stretch"] for seed in range(20)]
        assert least <= min(stretches) and max(stretches) <= most


def test_crops_avoid_a_single_class():
    label = np.zeros((128, 128), np.uint8)
    label[80:, 80:] = 1
    mixed = {}
    for limit in (1.0, 0.75):
        config = changed(STILL, scale=(3, 3), max_class_share=limit)
        boxes = [draw_view(label, (64, 64), config, np.random.default_rng(seed)).box for seed in range(200)]
        mixed[limit] = np.mean([0.25 < box.of(label).mean() < 0.75 for box in boxes])
    assert mixed[0.75] > mixed[1.0] + 0.3


@pytest.mark.parametrize("ignored", [255, 40])
def test_ignored_pixels_are_no_class_of_a_crop(ignored):
    """Left half class 0, right half ignored: wherever it is, no crop is mixed, so the first one drawn is not kept."""
    label = np.zeros((128, 128), np.uint8)
    label[:, 64:] = ignored
    config = changed(STILL, scale=(3, 3), max_class_share=0.9)
    boxes = {draw_view(label, (64, 64), config, np.random.default_rng(1), ignore).box for ignore in (255, 40)}
    assert len(boxes) == 2


def test_shrink_keeps_the_detail_that_is_shown():
    label = np.zeros((2000, 1500), np.uint8)
    for scale, shrink in ((0.1, 8), (0.3, 4), (0.9, 2), (1.1, 1), (2.0, 1)):
        config = changed(STILL, scale=(scale, scale))
        view = draw_view(label, (1024, 768), config, np.random.default_rng(0))
        assert view.shrink == shrink and view.box.width / shrink >= min(view.seen[0], view.box.width)
        assert all(number % shrink == 0 for number in view.box)
        assert draw_view(label, (1024, 768), changed(config, faithful=True), np.random.default_rng(0)).shrink == 1


@pytest.mark.parametrize("keys", [{"scale": (0, 1)}, {"blur_sigma": (2, 1)}, {"scale": (1, float("inf"))}, {"flip": 1}])
def test_bad_keys_are_refused(keys):
    with pytest.raises(ValidationError):
        AugmentConfig(**keys)
