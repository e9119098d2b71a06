"""Views made on the training device, beside those of the CPU."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError
from data.augment import AugmentConfig, Colour, draw_view
from data.batch import Batch
from data.codecs import decode_image, decode_mask
from data.device_render import images_on, with_labels
from data.labels import LabelSet, load_label_set
from data.render import IMAGE_FILL, cut
from data.synthetic import draw_face
from tests.conftest import ROOT
from tests.test_render import PATHS, QUALITY, psnr
from tests.views import IGNORE, SIZE, STILL, TURNING, blob, changed, mapped, pixels
from train.loss import PixelLoss

REAL = ROOT.parent / "shared/realdata/facesynthetics/dataset_60"
CPU = torch.device("cpu")
PLAIN = LabelSet("plain", tuple("abcdefghi"), ((0, 0, 0),) * 9, ())
PAIRED = replace(PLAIN, flip_pairs=((1, 2),))
SWAP = PAIRED.flip_table()
ALL = AugmentConfig(blur_probability=0.3, noise_probability=0.3, background_probability=0.3)


def finished(samples, label_set=PLAIN, stale=77) -> tuple[torch.Tensor, Batch]:
    """Images uint8 (B, 3, H, W), and the rest, of (image, label, view) in a batch that holds something else before."""
    size = samples[0][2].size
    images, labels = np.full((len(samples), *size, 3), stale, np.uint8), np.full((len(samples), *size), stale, np.uint8)
    for (image, label, view), *out in zip(samples, images, labels, strict=True):
        cut(image, label, view, *out)
    pair = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    batch = Batch([""] * len(samples), *pair, torch.zeros(len(samples)), None, views=[view for _, _, view in samples])
    batch = with_labels(batch, label_set, CPU)
    return images_on(batch, CPU), batch


def on_device(image, label, view, **options) -> tuple[np.ndarray, np.ndarray]:
    """As `views.pixels`."""
    images, batch = finished([(image, label, view)], **options)
    assert images.dtype == batch.labels.dtype == torch.uint8
    return images[0].permute(1, 2, 0).numpy(), batch.labels[0].numpy()


def well_inside(*labels) -> np.ndarray:
    """Two pixels from all that is ignored."""
    shown = np.logical_and.reduce([label != IGNORE for label in labels])
    return cv2.erode(shown.astype(np.uint8), np.ones((5, 5)), borderValue=1) > 0


SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300))
SIZES = st.tuples(st.integers(1, 120), st.integers(1, 120))


@given(SHAPES, SIZES, st.booleans(), st.floats(0.02, 3), st.integers(0, 2**32))
@settings(max_examples=250)
def test_unturned_views_are_those_of_the_cpu(shape, size, keep_aspect, scale, seed):
    rng = np.random.default_rng(seed)
    image, label = rng.integers(0, 256, (*shape, 3), np.uint8), rng.integers(0, 9, shape, np.uint8)
    config = changed(STILL, scale=(scale, scale), flip_probability=0.5, keep_aspect=keep_aspect)
    view = draw_view(label, size, config, rng)
    for width, height in (view.image_patch, view.label_patch):
        assert 0 < width <= view.place.width <= size[1] and 0 < height <= view.place.height <= size[0]
    expected, found = pixels(image, label, view, SWAP), on_device(image, label, view, label_set=PAIRED)
    assert np.array_equal(found[1], expected[1])
    assert np.abs(found[0].astype(int) - expected[0]).max() <= 1


@pytest.mark.parametrize("scale, config, decibels, agreement", QUALITY)
def test_as_near_to_the_faithful_as_the_fast(scale, config, decibels, agreement):
    for seed in range(4):
        image, label = draw_face(0, seed, 192)
        drawn = changed(config, scale=(scale, scale), flip_probability=0.5)
        view = draw_view(label, (256, 192), drawn, np.random.default_rng(seed))
        fast, faithful = pixels(image, label, view), pixels(image, label, replace(view, faithful=True))
        ours = on_device(image, label, view)
        inside = well_inside(fast[1], faithful[1], ours[1])
        near, fasts = (psnr(one[0][inside], faithful[0][inside]) for one in (ours, fast))
        same, fasts_same = ((one[1] == faithful[1]).mean() for one in (ours, fast))
        print(f"dB and agreement, device beside fast: {near:.1f} {fasts:.1f}, {same:.4f} {fasts_same:.4f}")
        assert near > min(decibels, 55) and near > min(fasts, 55)
        assert same > agreement and same >= fasts_same
        assert (ours[1] == fast[1]).mean() > 0.99
        assert ((ours[1] == IGNORE) != (faithful[1] == IGNORE)).sum() < 8  # the fast one ignores half a pixel more


@pytest.mark.parametrize("shape, keys", PATHS.values(), ids=PATHS)
def test_image_and_mask_stay_together(shape, keys):
    image, label = blob(*shape)
    for seed in range(4):
        view = draw_view(label, (128, 96), changed(TURNING, flip_probability=0.5, **keys), np.random.default_rng(seed))
        out_image, out_label = on_device(image, label, view)
        inside, white, one = out_label != IGNORE, out_image[..., 0] > 127, out_label == 1
        zoom = view.place.width / min(view.seen[0], view.box.width)
        middles = [np.argwhere(mask & inside).mean(axis=0) for mask in (white, one)]
        assert np.abs(middles[0] - middles[1]).max() < 0.2 + 0.12 * zoom


@pytest.mark.parametrize(
    "colour, to_fast, to_faithful",
    [
        (Colour(brightness=-31.3), 90, 90),
        (Colour(brightness=20.5, contrast=1.37), 70, 90),
        (Colour(saturation=0.61), 50, 50),
        (Colour(hue=-18), 50, 48),
        (Colour(20.5, 0.7, 1.4, 11, contrast_first=True), 45, 48),
        (Colour(20.5, 1.4, 0.6, -7, contrast_first=False), 50, 50),
    ],
)
def test_colours(colour, to_fast, to_faithful):
    """An undistorted example beside it stays as it is."""
    image, label = draw_face(0, 4, 96)
    still = draw_view(label, (96, 96), STILL, np.random.default_rng(0))
    view = replace(still, colour=colour)
    images, _ = finished([(image, label, still), (image, label, view)])
    plain, found = images.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(plain, image) and psnr(found, image) < 30
    assert psnr(found, pixels(image, label, view)[0]) > to_fast
    assert psnr(found, pixels(image, label, replace(view, faithful=True))[0]) > to_faithful


def test_gray_stays_gray_and_saturation_ends():
    colours = np.array([(0, 0, 0), (90, 90, 90), (255, 255, 255), (255, 0, 0), (200, 10, 10)], np.uint8)[None]
    still = draw_view(np.zeros((1, 5), np.uint8), (1, 5), changed(STILL, keep_aspect=False), np.random.default_rng(0))
    found, _ = on_device(colours, np.zeros((1, 5), np.uint8), replace(still, colour=Colour(saturation=1.5, hue=60)))
    assert found[0].tolist() == [[0, 0, 0], [90, 90, 90], [255, 255, 255], [0, 255, 0], [0, 200, 0]]


@pytest.mark.parametrize("config", [STILL, TURNING], ids=["upright", "turned"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_flip_is_the_mirrored_image_with_swapped_labels(config, scale):
    image, label = mapped(100, 40)
    view = draw_view(label, SIZE, changed(config, scale=(scale, scale)), np.random.default_rng(3))
    plain, flipped = (on_device(image, label, replace(view, flipped=how), label_set=PAIRED) for how in (False, True))
    mirrored = plain[0][:, ::-1], SWAP[plain[1][:, ::-1]]
    assert np.abs(mirrored[0].astype(int) - flipped[0])[well_inside(mirrored[1], flipped[1])].max() <= 1
    assert (mirrored[1] == flipped[1]).mean() > 0.98 and not np.array_equal(plain[1][:, ::-1], flipped[1])


@pytest.mark.parametrize("ignored_as", [IGNORE, 40])
@pytest.mark.parametrize("shape", [(64, 48), (16, 12), (25, 20)])
def test_what_lies_outside_is_filled_and_ignored(shape, ignored_as):
    image, label = np.full((*shape, 3), 200, np.uint8), np.zeros(shape, np.uint8)
    for seed in range(8):
        view = draw_view(label, SIZE, changed(TURNING, photometric=True), np.random.default_rng(seed))
        out_image, out_label = on_device(image, label, view, label_set=replace(PLAIN, ignore_index=ignored_as))
        ignored = out_label == ignored_as
        assert 0 < ignored.mean() < 0.6 and (out_image[ignored] == IMAGE_FILL).all()
        assert np.ptp(out_image[~ignored].astype(int), axis=0).max() == 0  # no fill mixed in, nor what was there before
        degraded, _ = on_device(image, label, replace(view, blur=2.0, noise=9.0, background=(0, 4)))
        assert (degraded[ignored] == IMAGE_FILL).all() and (degraded[~ignored] != out_image[~ignored]).any(1).mean() > 0.9


@pytest.mark.parametrize("keys", [{"blur": s} for s in (0.1, 0.5, 2.0, 40.0)] + [{"background": (0, n)} for n in (1, 8, 32)])
@pytest.mark.parametrize("size", [(96, 96), (3, 40)])
def test_backgrounds_and_blur_are_those_of_the_cpu(keys, size):
    image, label = draw_face(0, 2, 96)
    image, label = image[: size[0], : size[1]], label[: size[0], : size[1]]
    view = replace(draw_view(label, size, STILL, np.random.default_rng(0)), seed=5, **keys)
    found, expected = on_device(image, label, view)[0], pixels(image, label, view)[0]
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_noise_is_as_large_as_it_should_be_and_always_the_same():
    image, label = np.full((96, 96, 3), 128, np.uint8), np.zeros((96, 96), np.uint8)
    view = replace(draw_view(label, (96, 96), STILL, np.random.default_rng(0)), noise=5.0, seed=2**63 - 1)
    noisy = on_device(image, label, view)[0]
    assert np.array_equal(noisy, on_device(image, label, view)[0])
    other = on_device(image, label, replace(view, seed=7))[0]
    off = noisy.astype(float) - 128, other.astype(float) - 128
    assert abs(off[0].std() - 5) < 0.15 and abs(off[0].mean()) < 0.15 and abs((off[0] * off[1]).mean()) < 0.6


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 400), (400, 3), (1, 3000), (7, 9), (2160, 3840)])
def test_any_size_of_image_is_taken(shape):
    label = np.zeros(shape, np.uint8)
    label[:, shape[1] // 2 :] = 1
    image = np.dstack([label * 200] * 3)
    for seed, keep_aspect in enumerate([True, False] * 3):
        config = changed(ALL, keep_aspect=keep_aspect, noise_probability=0, background_probability=0, photometric=False)
        view = draw_view(label, SIZE, config, np.random.default_rng(seed))
        small = -(-shape[0] // view.shrink), -(-shape[1] // view.shrink)
        found = on_device(cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA), label, view)
        assert set(np.unique(found[1])) <= {0, 1, IGNORE} and (keep_aspect or (found[1] != IGNORE).mean() > 0.4)


def test_the_same_bits_whatever_else_is_in_the_batch_and_was_there_before():
    samples = []
    for seed in range(24):
        image, label = draw_face(0, seed, 64 + 16 * (seed % 5))
        samples.append((image, label, draw_view(label, SIZE, ALL, np.random.default_rng(seed))))
    assert {bool(getattr(s[2], name)) for s in samples for name in ("blur", "noise", "background")} == {True, False}
    images, batch = finished(samples, PAIRED)
    assert len({one.numpy().tobytes() for one in images}) == 24
    assert batch.pixel_counts.tolist() == [np.bincount(one.numpy().ravel(), minlength=256).tolist() for one in batch.labels]
    for size, stale in ((1, 0), (5, 255), (24, 200)):
        for start in range(0, 24, size):
            some = finished(samples[start : start + size], PAIRED, stale)
            assert torch.equal(some[0], images[start : start + size])
            assert torch.equal(some[1].labels, batch.labels[start : start + size])
            assert torch.equal(some[1].pixel_counts, batch.pixel_counts[start : start + size])


def test_labels_that_are_no_class_are_told():
    label = np.full((64, 48), 9, np.uint8)
    view = draw_view(label, SIZE, STILL, np.random.default_rng(0))
    _, batch = finished([(np.zeros((64, 48, 3), np.uint8), label, view)])
    with pytest.raises(DataError, match=r"a mask holds the labels \[9\]"):
        PixelLoss(torch.ones(9), PLAIN).totals(batch.pixel_counts)


@pytest.mark.skipif(not REAL.exists(), reason=f"{REAL} is not here")
def test_real_faces():
    faces, agreement, squares = load_label_set("face19"), [], []
    for seed, path in enumerate(sorted(REAL.glob("*_seg.png"))[:12]):
        label = decode_mask(path.read_bytes())
        image = decode_image(path.with_name(path.name.replace("_seg", "")).read_bytes())
        view = draw_view(label, (512, 384), AugmentConfig(), np.random.default_rng(seed))
        found, expected = on_device(image, label, view, label_set=faces), pixels(image, label, view, faces.flip_table())
        agreement.append((found[1] == expected[1]).mean())
        inside = well_inside(found[1], expected[1])
        squares.append(np.mean((found[0][inside].astype(float) - expected[0][inside]) ** 2))
    print(f"agreement {min(agreement):.4f}, {10 * np.log10(255**2 / np.mean(squares)):.1f} dB")
    assert min(agreement) > 0.99 and 10 * np.log10(255**2 / np.mean(squares)) > 38
