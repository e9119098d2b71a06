"""The training augmentation as the original's configs list it, one step after the other in plain OpenCV and NumPy.

Independent of `data.augment`, with its own drawing: what that must agree with in distribution (tests), and what it is
measured beside (benchmarks/data_pipeline.py). Its flaws are the original's: plain bilinear shrinking, images smaller
than the crop stretched to the input's shape, masks moved by half a source pixel.
"""

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class ReferencePipeline:
    """RGB uint8 (h, w, 3) and class ids uint8 (h, w) -> uint8 (3, H, W) and int64 (1, H, W), ready to be batched.

    The normalisation in float32 is left out: the original does it on the device.
    """

    size: tuple[int, int]  # (H, W)
    flip_pairs: tuple[tuple[int, int], ...] = ()
    scale: tuple[float, float] = (0.2, 2.0)
    max_class_share: float = 0.75
    rotate_probability: float = 0.5
    rotate_degrees: float = 45.0
    flip_probability: float = 0.5
    photometric: bool = True
    image_fill: int = 0
    label_fill: int = 255
    seed: int = 0

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def __call__(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image, label = self.random_resize(image, label)
        image, label = self.random_crop(image, label)
        image, label = resize(image, label, self.size[1], self.size[0])
        image, label = self.random_rotate(image, label)
        image, label = self.random_flip(image, label)
        if self.photometric:
            image = self.photometric_distortion(image)
        return np.ascontiguousarray(image.transpose(2, 0, 1)), label[None].astype(np.int64)

    def random_resize(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Into a box of a random multiple of the input size, the aspect kept."""
        factor = self.rng.uniform(*self.scale)
        height, width = label.shape
        sides = [int(side * factor) for side in self.size]
        ratio = min(max(sides) / max(height, width), min(sides) / min(height, width))
        return resize(image, label, int(width * ratio + 0.5), int(height * ratio + 0.5))

    def random_crop(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At most the input size; drawn anew, up to 10 times, where one class has too large a share."""

        def draw() -> tuple[slice, slice]:
            y, x = (
                self.rng.integers(max(have - want, 0) + 1) for have, want in zip(label.shape, self.size, strict=True)
            )
            return slice(y, y + self.size[0]), slice(x, x + self.size[1])

        crop = draw()
        for _ in range(10):
            classes, counts = np.unique(label[crop], return_counts=True)
            counts = counts[classes != self.label_fill]
            if len(counts) > 1 and counts.max() / counts.sum() < self.max_class_share:
                break
            crop = draw()
        return image[crop], label[crop]

    def random_rotate(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.rng.random() >= self.rotate_probability:
            return image, label
        height, width = label.shape
        degrees = self.rng.uniform(-self.rotate_degrees, self.rotate_degrees)
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1)
        fill = (self.image_fill,) * 3
        image = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR, borderValue=fill)
        label = cv2.warpAffine(label, turn, (width, height), flags=cv2.INTER_NEAREST, borderValue=self.label_fill)
        return image, label

    def random_flip(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.rng.random() >= self.flip_probability:
            return image, label
        image, label = np.flip(image, axis=1), np.flip(label, axis=1)
        swapped = label.copy()
        for left, right in self.flip_pairs:
            swapped[label == left] = right
            swapped[label == right] = left
        return image, swapped

    def photometric_distortion(self, image: np.ndarray) -> np.ndarray:
        rng = self.rng
        if rng.integers(2):
            image = scale_and_shift(image, 1, rng.uniform(-32, 32))
        contrast_first = rng.integers(2)
        if contrast_first and rng.integers(2):
            image = scale_and_shift(image, rng.uniform(0.5, 1.5), 0)
        if rng.integers(2):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 1] = scale_and_shift(hsv[..., 1], rng.uniform(0.5, 1.5), 0)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if rng.integers(2):
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
            hsv[..., 0] = (hsv[..., 0].astype(int) + rng.integers(-18, 18)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
        if not contrast_first and rng.integers(2):
            image = scale_and_shift(image, rng.uniform(0.5, 1.5), 0)
        return image


def resize(image: np.ndarray, label: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    size = max(1, width), max(1, height)
    return cv2.resize(image, size), cv2.resize(label, size, interpolation=cv2.INTER_NEAREST)


def scale_and_shift(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """uint8 * factor + shift in float32, clipped and truncated."""
    return np.clip(image.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)
