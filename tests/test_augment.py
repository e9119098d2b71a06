import cv2
import numpy as np
import pytest

from data.augment import IMAGE_FILL, AugmentConfig, adjust_hue_saturation, augment, distort_colours, scale_and_shift

IDENTITY = np.arange(256, dtype=np.uint8)
SWAP = IDENTITY.copy()
SWAP[[3, 4]] = 4, 3
STILL = AugmentConfig(scale=(1, 1), rotate_probability=0, flip_probability=0, photometric=False, max_class_share=1)


def coded(height, width):
    """An image whose red says the label: 3 on the left half, 4 on the right."""
    label = np.full((height, width), 3, np.uint8)
    label[:, width // 2 :] = 4
    return np.dstack([label * 40] * 3), label


def run(image, label, size, config, seed=0, table=IDENTITY):
    return augment(image, label, size, config, table, 255, np.random.default_rng(seed))


def test_nothing_drawn_is_nothing_done():
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (64, 48, 3), np.uint8), rng.integers(0, 5, (64, 48), np.uint8)
    out_image, out_label = run(image, label, (64, 48), STILL)
    assert np.array_equal(out_image, image) and np.array_equal(out_label, label)


def test_enlarging_matches_opencv_resize():
    image, label = coded(32, 24)
    image = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, image.shape, np.uint8), (0, 0), 2)
    out, out_label = run(image, label, (64, 48), STILL)
    assert np.abs(out.astype(int) - cv2.resize(image, (48, 64))).max() <= 2
    assert np.array_equal(out_label, cv2.resize(label, (48, 64), interpolation=cv2.INTER_NEAREST_EXACT))


def test_flip_mirrors_the_image_and_swaps_the_labels():
    image, label = coded(64, 48)
    image[:10, :5] = 255
    out_image, out_label = run(image, label, (64, 48), STILL.model_copy(update={"flip_probability": 1.0}), table=SWAP)
    assert np.array_equal(out_image, image[:, ::-1])
    assert np.array_equal(out_label, label)  # left half is 3 again: mirrored and swapped


@pytest.mark.parametrize("seed", range(12))
def test_image_and_label_stay_together(seed):
    """The image tells its own label by its brightness, so a pixel of another label is a misalignment."""
    image, label = coded(80, 100)
    config = AugmentConfig(photometric=False, scale=(0.5, 2.0))
    out_image, out_label = run(image, label, (64, 48), config, seed)
    inside = out_label != 255
    told = np.abs(out_image[..., 0].astype(int)[..., None] - np.array([120, 160])).argmin(-1) + 3
    edges = cv2.dilate((cv2.morphologyEx(out_label, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0).astype(np.uint8), np.ones((3, 3)))
    assert (told == out_label)[inside & (edges == 0)].all()


def test_outside_is_ignored_not_background():
    image, label = np.full((64, 48, 3), 200, np.uint8), np.zeros((64, 48), np.uint8)
    config = STILL.model_copy(update={"rotate_probability": 1.0, "rotate_degrees": 45.0})
    outs = [run(image, label, (64, 48), config, seed) for seed in range(8)]
    assert any(out_label[0, 0] == 255 and tuple(out_image[0, 0]) == IMAGE_FILL for out_image, out_label in outs)
    for out_image, out_label in outs:
        corner = cv2.erode((out_label == 255).astype(np.uint8), np.ones((3, 3)), borderValue=1) > 0
        assert (out_image[corner] == IMAGE_FILL).all()
        assert (out_label[28:36, 20:28] == 0).all()


def test_rotation_is_uniform_both_ways():
    """The line from the picture's middle to a dot, measured after rotation."""
    image, label = np.zeros((101, 101, 3), np.uint8), np.zeros((101, 101), np.uint8)
    label[50 - 2 : 50 + 3, 80 - 2 : 80 + 3] = 1
    config = STILL.model_copy(update={"rotate_probability": 1.0, "rotate_degrees": 30.0})
    angles = []
    for seed in range(300):
        ys, xs = np.nonzero(run(image, label, (101, 101), config, seed)[1] == 1)
        angles.append(np.degrees(np.arctan2(ys.mean() - 50, xs.mean() - 50)))
    assert -31 < min(angles) < -25 and 25 < max(angles) < 31 and abs(np.mean(angles)) < 4


def test_crops_avoid_a_single_class():
    label = np.zeros((128, 128), np.uint8)
    label[80:, 80:] = 1
    image = np.dstack([label] * 3)
    mixed = {}
    for limit in (1.0, 0.75):
        config = STILL.model_copy(update={"scale": (3.0, 3.0), "max_class_share": limit})
        crops = [run(image, label, (64, 64), config, seed)[1] for seed in range(200)]
        mixed[limit] = np.mean([0.25 < crop.mean() < 0.75 for crop in crops])
    assert mixed[0.75] > mixed[1.0] + 0.3


def test_scale_range_is_the_resize_ratio():
    """A square dot's size after the crop is its size times the drawn ratio."""
    image, label = np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96), np.uint8)
    label[44:52, 44:52] = 1
    config = STILL.model_copy(update={"scale": (1.0, 2.0)})
    sizes = [np.sqrt((run(image, label, (96, 96), config, seed)[1] == 1).sum()) / 8 for seed in range(200)]
    sizes = [size for size in sizes if size > 0.9]
    assert min(sizes) < 1.15 and max(sizes) > 1.8 and 1.3 < np.mean(sizes) < 1.65


def test_colour_steps():
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    assert np.array_equal(scale_and_shift(image, 1.5, 0), np.clip(image * 1.5, 0, 255).astype(np.uint8))
    assert np.array_equal(scale_and_shift(image, 1.0, -32), np.clip(image.astype(int) - 32, 0, 255).astype(np.uint8))
    assert np.ptp(adjust_hue_saturation(image, 0, 0.0).astype(int), axis=2).max() <= 1  # no saturation: gray
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    assert np.array_equal(adjust_hue_saturation(red, 60, 1.0)[0, 0], (0, 255, 0))


def test_colours_vary_about_themselves():
    image = np.full((4, 4, 3), (90, 120, 150), np.uint8)
    values = np.array([distort_colours(image, np.random.default_rng(seed)).mean() for seed in range(400)])
    assert abs(values.mean() - 120) < 6 and values.std() > 15
