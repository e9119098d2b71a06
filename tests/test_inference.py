"""Photos of all shapes to masks of their own size: whole, mirrored, in windows."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

from data.build_shards import main as build_shards
from data.labels import LabelSet
from data.shards import ShardSet
from model.images import UnreadableImage, find_images, read_image
from model.inference import Predictor, cover
from tests.model_cases import build_tiny
from train.evaluate import evaluate

SIZE = (32, 24)
COLORS = ((0, 0, 0), (250, 0, 0), (0, 250, 0), (0, 0, 250), (200, 200, 0))
LABELS = LabelSet("small", ("background", "skin", "left eye", "right eye", "hair"), COLORS, ((2, 3),))
SWAPPED = [0, 1, 3, 2, 4]
MODEL = build_tiny(image_size=SIZE)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take ten times as long over so small images where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    blobs = np.random.default_rng(seed).integers(0, 256, (7, 6, 3), np.uint8)
    return cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC)


SHAPES = [(32, 24), (64, 48), (40, 90), (91, 37), (5, 3), (1, 2)]
PHOTOS = [photo(*shape, seed) for seed, shape in enumerate(SHAPES)]


def masks(predictor: Predictor, images: list[np.ndarray] = PHOTOS, batch_size: int = 4) -> list[np.ndarray]:
    pictures = [predictor.prepare(i, image) for i, image in enumerate(images)]
    done = list(predictor.run(pictures, batch_size))
    assert [picture.key for picture in done] == list(range(len(images)))
    return [predictor.mask(picture) for picture in done]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


@torch.no_grad()
def logits_of(image: np.ndarray) -> torch.Tensor:
    """(5, h, w) at the image's own size, stretched through the model."""
    pixels = torch.from_numpy(cv2.resize(image, SIZE[::-1])).permute(2, 0, 1)[None]
    return F.interpolate(MODEL(pixels), image.shape[:2], mode="bilinear")[0]


def probabilities(predictor: Predictor, image: np.ndarray) -> torch.Tensor:
    picture = next(predictor.run([predictor.prepare(0, image)], 1))
    return torch.from_numpy(predictor.probabilities(picture)).float()


@pytest.mark.parametrize("keep_aspect", [True, False])
def test_masks_equal_those_that_are_scored(tmp_path, keep_aspect):
    for sub in ("images", "masks"):
        (tmp_path / sub).mkdir()
    for i, image in enumerate(PHOTOS[:4]):
        Image.fromarray(image).save(tmp_path / "images" / (f"{i}.jpg" if i % 2 else f"{i}.png"))
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[1:] = 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "set.yaml").write_text(yaml.safe_dump(LABELS.to_dict()))
    options = ["--dataset", "pairs", "--root", tmp_path, "--label-set", tmp_path / "set.yaml", "--out", tmp_path / "out"]
    assert build_shards([str(option) for option in [*options, "--val-fraction", 0, "--workers", 1]]) == 0
    shards = ShardSet.open(tmp_path / "out" / "train")
    _, shown = evaluate(MODEL, shards, SIZE, torch.device("cpu"), batch_size=2, keep_aspect=keep_aspect)
    images = [read_image(path) for path in find_images([str(tmp_path / "images")])]
    examples = shown["examples"]
    assert same(images, [one.photo for one in examples]) and len(examples) == 4
    assert same(masks(Predictor(MODEL, keep_aspect), images, batch_size=2), [one.prediction for one in examples])


def test_the_mirror_image_counts_as_much_with_its_classes_exchanged():
    image = PHOTOS[2]
    mirrored = logits_of(np.ascontiguousarray(image[:, ::-1])).flip(2)[SWAPPED]
    expected = (logits_of(image) + mirrored) / 2
    predictor = Predictor(MODEL, flip_pairs=LABELS.flip_pairs)
    np.testing.assert_array_equal(masks(predictor, [image])[0], expected.argmax(0))
    torch.testing.assert_close(probabilities(predictor, image), expected.softmax(0), atol=1e-3, rtol=0)


@pytest.mark.parametrize("options", [{}, {"keep_aspect": True}, {"window": 2}], ids=str)
def test_the_mirror_images_mask_is_the_mirrored_mask(options):
    predictor = Predictor(MODEL, flip_pairs=LABELS.flip_pairs, **options)
    found, plain = masks(predictor, batch_size=8), masks(Predictor(MODEL, **options), PHOTOS[2:4])
    mirrored = masks(predictor, [np.ascontiguousarray(image[:, ::-1]) for image in PHOTOS], batch_size=8)
    assert same(mirrored, [np.uint8(SWAPPED)[mask][:, ::-1] for mask in found])
    assert not same(found[2:4], plain)


@pytest.mark.parametrize(("length", "window"), [(24, 24), (25, 24), (36, 24), (37, 24), (1000, 24), (50, 7)])
def test_windows_cover_and_weigh_all_pixels_the_same(length, window):
    windows = cover(length, window)
    starts = [start for start, _ in windows]
    total = np.zeros(length)
    for start, weights in windows:
        assert weights.min() > 0
        total[start : start + window] += weights
    np.testing.assert_allclose(total, 1, rtol=1e-6)
    assert starts[0] == 0 and starts[-1] == length - window
    assert all(0 < b - a <= -(-window // 2) for a, b in zip(starts, starts[1:], strict=False))


def test_one_window_is_the_whole_image():
    for options in ({}, {"flip_pairs": LABELS.flip_pairs}):
        plain, windows = Predictor(MODEL, **options), Predictor(MODEL, window=1, **options)
        assert same(masks(plain, PHOTOS[:1]), masks(windows, PHOTOS[:1]))
        assert probabilities(plain, PHOTOS[0]).equal(probabilities(windows, PHOTOS[0]))


def test_overlapping_windows_are_averaged():
    image = photo(32, 36)
    hat = torch.cat([torch.arange(1, 13), torch.arange(12, 0, -1)])
    total, expected = torch.zeros(36), torch.zeros(5, 32, 36)
    for x in (0, 12):
        total[x : x + 24] += hat
        expected[:, :, x : x + 24] += logits_of(np.ascontiguousarray(image[:, x : x + 24])) * hat
    found = probabilities(Predictor(MODEL, window=float("inf")), image)
    torch.testing.assert_close(found, (expected / total).softmax(0), atol=1e-3, rtol=0)


def test_windows_of_large_and_small_images():
    image = photo(96, 160)
    by_limit = {limit: Predictor(MODEL, window=limit) for limit in (1, 2, float("inf"))}
    canvases = [by_limit[limit].prepare(0, image).views[0].canvas.shape[:2] for limit in by_limit]
    assert canvases == [(32, 53), (64, 107), (96, 160)]
    assert [len(by_limit[limit].prepare(0, image).views[0].tiles) for limit in by_limit] == [4, 24, 65]
    assert all(masks(predictor, [image], batch_size=16)[0].shape == (96, 160) for predictor in by_limit.values())
    assert not same(masks(by_limit[2], [image]), masks(Predictor(MODEL), [image]))
    # Small ones are enlarged until they cover a window, and lose neither their shape nor their size.
    assert by_limit[1].prepare(0, PHOTOS[4]).views[0].canvas.shape == (40, 24, 3)
    assert [mask.shape for mask in masks(by_limit[1])] == SHAPES
    with pytest.raises(UnreadableImage, match="9000x1 pixels are too long and thin"):
        by_limit[1].prepare(0, photo(1, 9000))


@pytest.mark.parametrize("options", [{}, {"flip_pairs": LABELS.flip_pairs, "window": 2}], ids=["plain", "flip and window"])
def test_the_batch_size_changes_nothing(options):
    predictor = Predictor(MODEL, keep_aspect=True, **options)
    images = PHOTOS[1:3] if options else PHOTOS
    expected = masks(predictor, images, batch_size=1)
    assert len({mask.tobytes() for mask in expected}) == len(images) and len(np.unique(expected[1])) > 2
    for batch_size in (3, 100):
        assert same(masks(predictor, images, batch_size), expected)


def test_few_images_are_held_at_a_time():
    predictor = Predictor(MODEL)
    asked = []
    pictures = (asked.append(i) or predictor.prepare(i, PHOTOS[0]) for i in range(50))
    for count, _ in enumerate(predictor.run(pictures, batch_size=4), 1):
        assert len(asked) <= count + 4
