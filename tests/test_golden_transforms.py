"""Each step of the augmentation with fixed numbers, beside what the original code makes of the same picture.

fixtures/golden_transforms.npz, RGB: `v1/` from Sapiens v1 (mmcv), `v2/` from Sapiens2; both have the same picture, `v1/image`
and `v1/mask`. Where ours is another on purpose, a test says how and by how much.
"""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.augment import Box, Colour, View, _is_mixed
from data.labels import load_label_set
from data.render import distort_colours, resize_for_validation
from model.segmenter import normalize
from tests.views import IDENTITY, IGNORE, pixels

with np.load(Path(__file__).parent / "fixtures" / "golden_transforms.npz") as file:
    GOLDEN = dict(file)
IMAGE, MASK = GOLDEN["v1/image"], GOLDEN["v1/mask"]
FAITHFUL = pytest.mark.parametrize("faithful", [False, True], ids=["fast", "faithful"])


def show(image, label, size=None, table=IDENTITY, **changed):
    """All of a picture, in a view that changes nothing but what is given; `size` (H, W) is that of a plain resize."""
    height, width = size or label.shape
    values = dict(
        size=(height, width), box=Box(0, 0, label.shape[1], label.shape[0]), unit=1, seen=(width, height),
        place=Box(0, 0, width, height), degrees=0.0, flipped=False, colour=Colour(), background=None, blur=0.0, noise=0.0,
        seed=0, faithful=False,
    )  # fmt: skip
    return pixels(image, label, View(**(values | changed)), table)


def difference(image, expected):
    return np.abs(image.astype(int) - expected)


@FAITHFUL
@pytest.mark.parametrize(("version", "label_set"), [("v1", "face19"), ("v2", "sapiens2_29")])
def test_flips_and_swapped_labels(version, label_set, faithful):
    image, mask, expected, expected_mask = (
        GOLDEN[f"{version}/flip/{name}"] for name in ("image", "mask", "image_out", "mask_out")
    )
    table = load_label_set(label_set).flip_table()
    out, out_mask = show(image, mask, table=table, flipped=True, faithful=faithful)
    assert np.array_equal(out, expected) and np.array_equal(out_mask, expected_mask)
    assert not np.array_equal(mask[:, ::-1], expected_mask)


def test_validation_pictures_and_their_normalisation():
    out, place = resize_for_validation(GOLDEN["v1/test/image"], (1024, 768), keep_aspect=False)
    assert place == (0, 0, 768, 1024)
    assert difference(out[::8, ::8], GOLDEN["v1/test/every_8th_resized"]).max() <= 1  # 0 with the same OpenCV
    crop = torch.from_numpy(out[300:364, 200:264]).permute(2, 0, 1)[None]
    # One gray level, which another OpenCV may differ by, is a 57th of a deviation.
    assert np.abs(normalize(crop)[0].numpy() - GOLDEN["v1/test/normalised_y300_x200"]).max() < 0.018
    whole = normalize(torch.from_numpy(IMAGE).permute(2, 0, 1)[None]).numpy()
    assert np.abs(whole - GOLDEN["v2/normalised"]).max() < 1e-5


def inner(mask):
    """Where the view shows the source, but for the outermost pixels: these blend into a fill that is the original's own."""
    return cv2.erode((mask != IGNORE).astype(np.uint8), np.ones((3, 3)), borderValue=0) > 0


@FAITHFUL
@pytest.mark.parametrize("degrees", [17.3, -40.0])
def test_rotation(degrees, faithful):
    """Clockwise, about the picture's middle."""
    out, out_mask = show(IMAGE, MASK, degrees=degrees, faithful=faithful)
    shown = inner(out_mask)
    assert shown.mean() > 0.7
    assert difference(out, GOLDEN[f"v1/rotate_{degrees}_img"])[shown].max() <= 1
    assert np.array_equal(out_mask[shown], GOLDEN[f"v1/rotate_{degrees}_mask"][shown])


@FAITHFUL
def test_rotation_of_sapiens2(faithful):
    """Counter-clockwise there, and about a point half a pixel off the middle: the middle of one more row and column."""
    image = np.pad(IMAGE, ((0, 1), (0, 1), (0, 0)))
    mask = np.pad(MASK, ((0, 1), (0, 1)), constant_values=IGNORE)
    out, out_mask = (array[:-1, :-1] for array in show(image, mask, degrees=-23.5, faithful=faithful))
    shown = inner(out_mask)
    assert shown.mean() > 0.7
    assert difference(out, GOLDEN["v2/rotate_23.5/image"])[shown].max() <= 1
    assert np.array_equal(out_mask[shown], GOLDEN["v2/rotate_23.5/mask"][shown])


# Of the fast colours, most and mean difference: contrast is rounded once, in other places; hue and saturation are turned in
# 256 steps instead of 180, and rounded instead of cut off.
@pytest.mark.parametrize(
    ("name", "colour", "most", "mean"),
    [
        ("brightness_beta20.5", Colour(brightness=20.5), 0, 0),
        ("contrast_alpha1.3", Colour(contrast=1.3), 1, 0.1),
        ("saturation_alpha0.7", Colour(saturation=0.7), 6, 0.4),
        ("hue_plus11", Colour(hue=11), 8, 0.5),
        ("hue_minus18", Colour(hue=-18), 8, 0.5),
    ],
)
def test_colours(name, colour, most, mean):
    expected = GOLDEN[f"v1/{name}"]
    step_by_step, _ = show(IMAGE, MASK, colour=colour, faithful=True)
    assert difference(step_by_step, expected).max() <= 1
    fast = difference(distort_colours(IMAGE, colour), expected)
    assert fast.max() <= most and fast.mean() <= mean
    assert difference(IMAGE, expected).mean() > 5  # a distortion that one sees


@FAITHFUL
@pytest.mark.parametrize("size", [(51, 38), (112, 84)])
def test_resize(size, faithful):
    """Bilinear, as the original's; the faithful steps shrink by averaging, which keeps fine patterns from flickering."""
    out, _ = show(IMAGE, MASK, size, faithful=faithful)
    found = difference(out, GOLDEN[f"v1/imrescale_{size[1]}x{size[0]}_img"])
    if faithful and size < MASK.shape:
        averaged = cv2.resize(IMAGE, size[::-1], interpolation=cv2.INTER_AREA)
        assert np.array_equal(out, averaged) and 1 < found.mean() < 2
    else:
        assert found.max() <= 1


@pytest.mark.parametrize("name", ["resize_40x30", "resize_80x40", "resize_keep_40x30", "resize_keep_80x40"])
def test_faithful_shrinking_is_that_of_sapiens2(name):
    expected = GOLDEN[f"v2/{name}/image"]
    out, _ = show(IMAGE, MASK, expected.shape[:2], faithful=True)
    assert difference(out, expected).max() <= 1


@pytest.mark.parametrize("name", ["resize_96x80", "resize_keep_96x80"])
def test_enlarging_is_bilinear_where_sapiens2s_is_cubic(name):
    expected = GOLDEN[f"v2/{name}/image"]
    out, _ = show(IMAGE, MASK, expected.shape[:2])
    assert 2 < difference(out, expected).mean() < 4
    cubic = cv2.resize(IMAGE, expected.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    assert difference(cubic, expected).max() <= 1  # there is no other difference


RESIZED = ["v1/imrescale_38x51", "v1/imrescale_84x112"]
RESIZED += [key.removesuffix("/mask") for key in GOLDEN if key.startswith("v2/resize") and key.endswith("/mask")]


@FAITHFUL
@pytest.mark.parametrize("name", RESIZED)
def test_masks_take_the_label_at_each_pixels_middle(name, faithful):
    """The original's take it at the pixel's corner, which moves them against their images by half a source pixel."""
    expected = GOLDEN[name + ("_mask" if name.startswith("v1") else "/mask")]
    _, mask = show(IMAGE, MASK, expected.shape, faithful=faithful)
    places = [np.arange(new) * old / new for new, old in zip(expected.shape, MASK.shape, strict=True)]
    assert np.array_equal(expected, MASK[np.ix_(*(place.astype(int) for place in places))])
    middles = [place + place[1] / 2 for place in places]
    between = np.logical_or.outer(*(np.isclose(middle, np.round(middle)) for middle in middles))  # two: either will do
    at_middles = MASK[np.ix_(*(middle.astype(int) for middle in middles))]
    assert np.array_equal(mask[~between], at_middles[~between]) and not between.all()


def test_crops_are_accepted_as_there():
    """The original's crops of 64x48 for the seeds 0 to 39: drawn up to ten times, until no class has 75 % or more."""
    mask = GOLDEN["v1/crop/mask"]
    for seed, (top, bottom, left, right) in enumerate(GOLDEN["v1/crop/boxes"]):
        rng = np.random.RandomState(seed)
        for _ in range(10):
            y, x = (rng.randint(0, side - crop + 1) for side, crop in zip(mask.shape, (64, 48), strict=True))
            if _is_mixed(mask, Box(x, y, 48, 64), 1, 0.75, IGNORE):
                break
        assert (y, y + 64, x, x + 48) == (top, bottom, left, right)
