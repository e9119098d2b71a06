"""Class numbers for photos of any size: the whole photo at once or in windows, with or without its mirror image.

All of it gives logits, which are averaged, and enlarged one class at a time: those of 28 classes for a photo of 50
megapixels would take 5.6 GB.
"""

import math
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.images import UnreadableImage
from model.segmenter import Segmenter

FILL = (124, 116, 104)  # the normalisation mean: nothing once normalised
MAX_ENLARGED = 64  # windows' areas; that a narrow photo covers one may make it so large and no larger


class Tile(NamedTuple):
    """A part of a canvas that the model takes as one image; a window's logits count rows x columns, float32 each."""

    y: int
    x: int
    weights: tuple[np.ndarray, np.ndarray] | None = None  # None: it is the whole canvas


@dataclass
class View:
    """A photo or its mirror image, resized, as one tile or several; later its logits."""

    canvas: np.ndarray  # RGB uint8 (h, w, 3)
    place: tuple[slice, slice]  # rows and columns of the canvas that the photo takes; the rest is fill
    tiles: list[Tile]
    logits: Tensor | None = None  # (C, h', w') of the whole canvas
    pending: int = 0  # tiles without logits so far

    def __post_init__(self) -> None:
        self.pending = len(self.tiles)

    def add(self, tile: Tile, logits: Tensor, tile_size: tuple[int, int]) -> None:
        """logits: (C, h', w') of one tile."""
        self.pending -= 1
        if tile.weights is None:
            self.logits = logits
            return
        if self.logits is None:
            self.logits = logits.new_zeros((len(logits), *self.canvas.shape[:2]), dtype=torch.float32)
        height, width = tile_size
        enlarged = F.interpolate(logits[None].float(), tile_size, mode="bilinear")[0]
        rows, columns = (torch.from_numpy(weights).to(logits.device) for weights in tile.weights)
        self.logits[:, tile.y : tile.y + height, tile.x : tile.x + width] += enlarged * torch.outer(rows, columns)

    def class_logits(self, i: int, size: tuple[int, int]) -> Tensor:
        """fp32 (height, width) of class i, at the photo's own size."""
        logits = self.logits[None, i : i + 1].float()
        whole = (slice(0, self.canvas.shape[0]), slice(0, self.canvas.shape[1]))
        if self.place != whole:
            logits = F.interpolate(logits, self.canvas.shape[:2], mode="bilinear")[..., *self.place]
        return F.interpolate(logits, size, mode="bilinear")[0, 0]


@dataclass
class Picture:
    """A photo on its way through the model."""

    key: Hashable
    image: np.ndarray  # RGB uint8 (h, w, 3)
    views: list[View]  # the photo's, then its mirror image's if that is wanted


class Predictor:
    """Masks of photos, computed where the model is and in its precision; they equal those that `train.evaluate` scores.

    Args:
        keep_aspect: how the model was trained: a photo keeps its shape, the rest of the input being filled with the mean
            colour; else it is stretched to the model's image_size.
        flip_pairs: averages the logits with those of the mirror image, in which these pairs of classes change places.
            None: does not.
        window: at least 1. A photo keeps its shape and its resolution, but is made so large that it covers the model's
            image_size, and at most `window` times that large; windows of image_size overlap by half or more, and their
            logits are averaged with weights that fall linearly from a window's centre to its border. None: does not.
    """

    def __init__(
        self,
        model: Segmenter,
        keep_aspect: bool = False,
        flip_pairs: Iterable[tuple[int, int]] | None = None,
        window: float | None = None,
    ) -> None:
        assert window is None or window >= 1, f"window of {window}"
        self.model, self.keep_aspect, self.window = model, keep_aspect, window
        self.mirrored: list[int] | None = None  # the class that each class is in the mirror image
        if flip_pairs is not None:
            self.mirrored = list(range(model.num_classes))
            for a, b in flip_pairs:
                self.mirrored[a], self.mirrored[b] = b, a

    def prepare(self, key: Hashable, image: np.ndarray) -> Picture:
        """RGB uint8 (h, w, 3) -> what `run` takes. May run in any thread.

        Raises UnreadableImage for one so long and thin that windows would enlarge it beyond measure.
        """
        # The photo is mirrored, not its view: rounding would make the views differ, and the mean depend on the side.
        sides = [image] if self.mirrored is None else [image, cv2.flip(image, 1)]
        look = self._whole if self.window is None else self._windows
        return Picture(key, image, [look(side) for side in sides])

    def _whole(self, image: np.ndarray) -> View:
        size = height, width = self.model.image_size
        if self.keep_aspect:
            ratio = min(height / image.shape[0], width / image.shape[1])
            height, width = max(1, round(image.shape[0] * ratio)), max(1, round(image.shape[1] * ratio))
        y, x = (size[0] - height) // 2, (size[1] - width) // 2
        place = slice(y, y + height), slice(x, x + width)
        canvas = np.full((*size, 3), FILL, np.uint8)
        canvas[place] = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        return View(canvas, place, [Tile(0, 0)])

    def _windows(self, image: np.ndarray) -> View:
        size = self.model.image_size
        covering = max(size[0] / image.shape[0], size[1] / image.shape[1])
        ratio = max(covering, min(1.0, covering * self.window))
        height, width = (max(side, round(old * ratio)) for side, old in zip(size, image.shape[:2], strict=True))
        if ratio > 1 and height * width > MAX_ENLARGED * size[0] * size[1]:
            raise UnreadableImage(f"{image.shape[1]}x{image.shape[0]} pixels are too long and thin for windows")
        shrink_or_grow = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
        canvas = cv2.resize(image, (width, height), interpolation=shrink_or_grow)
        rows, columns = cover(height, size[0]), cover(width, size[1])
        tiles = [Tile(y, x, (down, across)) for y, down in rows for x, across in columns]
        return View(canvas, (slice(0, height), slice(0, width)), tiles)

    @torch.inference_mode()
    def run(self, pictures: Iterable[Picture], batch_size: int) -> Iterator[Picture]:
        """The same pictures in the same order with their logits; the model gets `batch_size` tiles at a time, of one
        picture or several. At most batch_size + 1 pictures are held."""
        unfinished: deque[Picture] = deque()
        batch: list[tuple[View, Tile]] = []
        for picture in pictures:
            unfinished.append(picture)
            for view in picture.views:
                for tile in view.tiles:
                    batch.append((view, tile))
                    if len(batch) == batch_size:
                        self._forward(batch)
                        batch = []
            while unfinished and not any(view.pending for view in unfinished[0].views):
                yield unfinished.popleft()
        if batch:
            self._forward(batch)
        yield from unfinished

    def _forward(self, batch: list[tuple[View, Tile]]) -> None:
        height, width = self.model.image_size
        pixels = np.stack([view.canvas[tile.y : tile.y + height, tile.x : tile.x + width] for view, tile in batch])
        device = self.model.decode_head.conv_seg.bias.device
        logits = self.model(torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2))
        for (view, tile), tile_logits in zip(batch, logits, strict=True):
            view.add(tile, tile_logits, (height, width))

    @torch.inference_mode()
    def mask(self, picture: Picture) -> np.ndarray:
        """Class numbers, uint8 (h, w), of a picture that `run` has given back."""
        best, mask = None, None
        for i in range(self.model.num_classes):
            logits = self._class_logits(picture, i)
            if best is None:
                best, mask = logits, torch.zeros_like(logits, dtype=torch.uint8)
            else:
                mask.masked_fill_(logits > best, i)
                best = torch.maximum(best, logits)
        return mask.cpu().numpy()

    @torch.inference_mode()
    def probabilities(self, picture: Picture) -> np.ndarray:
        """float16 (C, h, w): the softmax of the averaged logits."""
        logits = torch.stack([self._class_logits(picture, i) for i in range(self.model.num_classes)])
        return logits.softmax(0).half().cpu().numpy()

    def _class_logits(self, picture: Picture, i: int) -> Tensor:
        size = picture.image.shape[:2]
        logits = picture.views[0].class_logits(i, size)
        if self.mirrored is None:
            return logits
        return (logits + picture.views[1].class_logits(self.mirrored[i], size).flip(1)) / 2


def cover(length: int, window: int) -> list[tuple[int, np.ndarray]]:
    """Windows evenly spread over `length` pixels, neighbours overlapping by half or more: the first pixel of each, and its
    weights, float32 (window,), that fall linearly to both ends. At each pixel the windows' weights add up to 1."""
    count = 1 + math.ceil((length - window) / (window / 2))
    starts = [round(i * (length - window) / max(1, count - 1)) for i in range(count)]
    hat = np.minimum(np.arange(1, window + 1), np.arange(window, 0, -1)).astype(np.float32)
    total = np.zeros(length, np.float32)
    for start in starts:
        total[start : start + window] += hat
    return [(start, hat / total[start : start + window]) for start in starts]
