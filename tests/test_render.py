"""Pixels of views."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from data.augment import AugmentConfig, Box, Colour, draw_view
from data.render import IMAGE_FILL, distort_colours, render
from data.synthetic import draw_face
from tests.views import IDENTITY, IGNORE, SIZE, STILL, TURNING, blob, changed, draw, mapped, pixels

SWAP = IDENTITY.copy()
SWAP[[1, 2]] = 2, 1


def psnr(a, b):
    return 10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("faithful", [False, True])
def test_nothing_drawn_is_nothing_done(faithful):
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (64, 48, 3), np.uint8), rng.integers(0, 5, (64, 48), np.uint8)
    out_image, out_label = draw(image, label, changed(STILL, faithful=faithful))
    assert np.array_equal(out_image, image) and np.array_equal(out_label, label)


PATHS = {
    "as it is": ((64, 48), {}),
    "larger": ((64, 48), {"scale": (1.7, 1.7)}),
    "much larger": ((16, 12), {}),
    "smaller": ((64, 48), {"scale": (0.6, 0.6)}),
    "small, enlarged again": ((128, 96), {"scale": (0.45, 0.45)}),
    "shrunk by units": ((515, 390), {"scale": (1.1, 1.1)}),
    "square": ((90, 90), {"scale": (0.9, 0.9)}),
    "stretched": ((60, 90), {"scale": (0.9, 0.9), "keep_aspect": False}),
}


@pytest.mark.parametrize("config", [STILL, TURNING], ids=["upright", "turned"])
@pytest.mark.parametrize("faithful", [False, True], ids=["fast", "faithful"])
@pytest.mark.parametrize("shape, keys", PATHS.values(), ids=PATHS)
def test_image_and_mask_stay_together(shape, keys, faithful, config):
    """The edge of the blob, at half its brightness in the image, is the mask's edge: to a third of an output pixel
    where nothing is enlarged, and apart from the stairs of a mask that is."""
    image, label = blob(*shape)
    for seed in range(4):
        drawn = changed(config, flip_probability=0.5, faithful=faithful, **keys)
        view = draw_view(label, (128, 96), drawn, np.random.default_rng(seed))
        out_image, out_label = pixels(image, label, view)
        inside, white, one = out_label != IGNORE, out_image[..., 0] > 127, out_label == 1
        zoom = view.place.width / min(view.seen[0], view.box.width)
        middles = [np.argwhere(mask & inside).mean(axis=0) for mask in (white, one)]
        assert np.abs(middles[0] - middles[1]).max() < 0.2 + 0.12 * zoom
        edge = cv2.morphologyEx(one.astype(np.uint8), cv2.MORPH_GRADIENT, np.ones((2, 2))).sum()
        assert ((white != one) & inside).sum() < 0.3 * max(1, zoom) * edge


def test_decoded_smaller_is_the_same_view():
    image, label = blob(515, 390)
    for seed in range(4):
        config = changed(TURNING, scale=(0.5, 1.2), rotate_probability=0.5)
        view = draw_view(label, SIZE, config, np.random.default_rng(seed))
        assert view.shrink in (4, 8)
        padded = cv2.copyMakeBorder(image, 0, 5, 0, 2, cv2.BORDER_REPLICATE)  # as JPEG does, to whole blocks
        small = cv2.resize(padded, None, fx=1 / view.shrink, fy=1 / view.shrink, interpolation=cv2.INTER_AREA)
        small = small[: -(-515 // view.shrink), : -(-390 // view.shrink)]
        whole, reduced = pixels(image, label, view), pixels(small, label, view)
        assert np.array_equal(whole[1], reduced[1]) and psnr(whole[0], reduced[0]) > 45


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("width", [80, 40])  # 40: too narrow for the output
def test_flip_is_the_mirrored_image_with_swapped_labels(width, scale):
    image, label = mapped(100, width)
    for config in (STILL, TURNING):
        view = draw_view(label, SIZE, changed(config, scale=(scale, scale)), np.random.default_rng(3))
        plain, flipped = pixels(image, label, view), pixels(image, label, replace(view, flipped=True), table=SWAP)
        mirrored = plain[0][:, ::-1], SWAP[plain[1][:, ::-1]]
        shown = (mirrored[1] != IGNORE) & (flipped[1] != IGNORE)
        assert np.abs(mirrored[0].astype(int) - flipped[0])[shown].max() <= 3
        assert (mirrored[1] == flipped[1]).mean() > 0.96 and shown.mean() > 0.3
        assert not np.array_equal(plain[1][:, ::-1], flipped[1]) and flipped[1].max() in (2, IGNORE)


# Of scale, config, least PSNR of the image, least agreement of the mask.
QUALITY = [(1.5, STILL, 60, 0.985), (1.5, TURNING, 38, 0.97), (0.5, STILL, 38, 0.97), (0.5, TURNING, 36, 0.96)]


@pytest.mark.parametrize("scale, config, decibels, agreement", QUALITY)
def test_fast_is_near_to_faithful(scale, config, decibels, agreement):
    for seed in range(4):
        image, label = draw_face(0, seed, 192)
        drawn = changed(config, scale=(scale, scale), flip_probability=0.5)
        view = draw_view(label, (256, 192), drawn, np.random.default_rng(seed))
        fast, faithful = (pixels(image, label, replace(view, faithful=faithful)) for faithful in (False, True))
        shown = (fast[1] != IGNORE) & (faithful[1] != IGNORE)
        assert psnr(fast[0][shown], faithful[0][shown]) > decibels
        assert (fast[1] == faithful[1]).mean() > agreement


@pytest.mark.parametrize(
    "colour, decibels",
    [
        (Colour(brightness=-31.3), 90),
        (Colour(brightness=20.5, contrast=1.37), 70),
        (Colour(saturation=0.61), 44),
        (Colour(hue=-18), 44),
        (Colour(20.5, 0.7, 1.4, 11, contrast_first=True), 44),
        (Colour(20.5, 1.4, 0.6, -7, contrast_first=False), 42),
    ],
)
def test_fast_colours_are_near_to_the_step_by_step_ones(colour, decibels):
    image, label = draw_face(0, 4, 96)
    view = replace(draw_view(label, (96, 96), STILL, np.random.default_rng(0)), colour=colour, faithful=True)
    faithful, _ = pixels(image, label, view)
    assert psnr(distort_colours(image, colour), faithful) > decibels
    assert psnr(image, faithful) < 30


def test_hue_turns_and_saturation_fades():
    red = np.full((1, 1, 3), (255, 0, 0), np.uint8)
    assert np.abs(distort_colours(red, Colour(hue=60))[0, 0] - np.array([0, 255, 0])).max() <= 6
    assert np.abs(distort_colours(red, Colour(saturation=0.5))[0, 0] - np.array([255, 128, 128])).max() <= 1


def test_a_small_image_reaches_two_borders_and_lies_anywhere_between_the_others():
    image, label = np.full((40, 80, 3), 200, np.uint8), np.zeros((40, 80), np.uint8)
    tops = set()
    for seed in range(40):
        view = draw_view(label, SIZE, changed(STILL, scale=(0.75, 0.75)), np.random.default_rng(seed))
        out_image, out_label = pixels(image, label, view)
        shown = np.zeros(SIZE, bool)
        view.place.of(shown)[:] = True
        assert view.place == Box(0, view.place.y, 48, 24)
        assert np.array_equal(out_label == 0, shown) and np.array_equal((out_image == 200).all(2), shown)
        assert (out_image[~shown] == IMAGE_FILL).all() and (out_label[~shown] == IGNORE).all()
        tops.add(view.place.y)
    assert len(tops) > 15 and min(tops) < 5 and max(tops) > 35


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (16, 12), (25, 20)])
def test_corners_of_a_turned_image_are_filled_and_ignored(shape, faithful):
    image, label = np.full((*shape, 3), 200, np.uint8), np.zeros(shape, np.uint8)
    config = changed(TURNING, photometric=True, faithful=faithful)
    for seed in range(8):
        out_image, out_label = draw(image, label, config, seed)
        ignored = out_label == IGNORE
        well_inside = cv2.erode(ignored.astype(np.uint8), np.ones((3, 3)), borderValue=1) > 0
        assert 0 < ignored.mean() < 0.6 and (out_image[well_inside] == IMAGE_FILL).all()
        assert np.ptp(out_image[~ignored].astype(int), axis=0).max() <= (80 if faithful else 0)  # no fill mixed in


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("scale", [0.15, 0.3, 0.55, 1.0])
def test_shrinking_averages(scale, faithful):
    """White noise loses contrast by the ratio; picked pixels would keep theirs."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 384), np.uint8)
    image, label = np.dstack([noise] * 3), np.zeros((512, 384), np.uint8)
    config = changed(STILL, scale=(scale, scale), faithful=faithful)
    out, _ = draw(image, label, config, size=(256, 192))
    assert out.std() < 1.6 * 0.5 * scale * image.std()


def test_a_small_ratio_loses_detail_though_it_is_enlarged_again():
    image, label = draw_face(0, 3, 192)
    detail = {}
    for scale in (0.25, 1.0):
        out, _ = draw(image, label, changed(STILL, scale=(scale, scale)), size=(192, 192))
        detail[scale] = cv2.Laplacian(out, cv2.CV_64F).std()
    assert detail[0.25] < 0.5 * detail[1.0]


def test_the_same_numbers_give_the_same_bytes_whatever_was_there_before():
    image, label = draw_face(0, 1, 128)
    config = AugmentConfig(blur_probability=0.5, noise_probability=0.5, background_probability=0.5)
    seen = set()
    for seed in range(12):
        first, again = (draw(image, label, config, seed, stale=stale) for stale in (0, 200))
        assert np.array_equal(first[0], again[0]) and np.array_equal(first[1], again[1])
        seen.add(first[0].tobytes())
    assert len(seen) == 12


def test_only_the_given_rows_of_a_batch_are_written():
    image, label = draw_face(0, 1, 128)
    images, labels = np.full((3, *SIZE, 3), 77, np.uint8), np.full((3, *SIZE), 77, np.uint8)
    before, config = (image.copy(), label.copy()), AugmentConfig(noise_probability=0.5, blur_probability=0.5)
    for seed in range(12):
        view = draw_view(label, SIZE, config, np.random.default_rng(seed))
        render(image, label, view, SWAP, IGNORE, images[1], labels[1])
        assert (labels[1] != 77).all()
    assert (images[[0, 2]] == 77).all() and (labels[[0, 2]] == 77).all()
    assert np.array_equal(image, before[0]) and np.array_equal(label, before[1])


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 400), (400, 3), (1, 3000), (7, 9), (2160, 3840)])
def test_any_size_of_image_is_taken(shape):
    label = np.zeros(shape, np.uint8)
    label[:, shape[1] // 2 :] = 1
    image = np.dstack([label * 200] * 3)
    for i, keep_aspect in enumerate([True, False] * 4):
        config = AugmentConfig(keep_aspect=keep_aspect, faithful=i == 7, noise_probability=0.2, blur_probability=0.2)
        _, out_label = draw(image, label, config, seed=i)
        assert set(np.unique(out_label)) <= {0, 1, IGNORE}
        assert keep_aspect or (out_label != IGNORE).mean() > 0.4


def test_extras():
    image, label = draw_face(0, 2, 96)
    plain, out_label = draw(image, label, STILL, size=(96, 96))
    blurred, _ = draw(image, label, changed(STILL, blur_probability=1, blur_sigma=(2, 2)), size=(96, 96))
    assert cv2.Laplacian(blurred, cv2.CV_64F).std() < 0.3 * cv2.Laplacian(plain, cv2.CV_64F).std()
    noisy, _ = draw(image, label, changed(STILL, noise_probability=1, noise_sigma=(5, 5)), size=(96, 96))
    assert 4 < (noisy.astype(float) - plain).std() < 5.5
    config = changed(STILL, background_probability=1, background_class=0)
    backgrounds = [draw(image, label, config, seed, size=(96, 96))[0] for seed in range(6)]
    for moved in backgrounds:
        assert np.array_equal(moved[out_label != 0], plain[out_label != 0])
        assert (moved[out_label == 0] != plain[out_label == 0]).any(axis=1).mean() > 0.9
    assert len({moved.tobytes() for moved in backgrounds}) == 6


