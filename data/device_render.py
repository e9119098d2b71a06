"""What `data.render` does with OpenCV for one example, done with PyTorch for a batch, on the training device.

The workers have cut patches (`render.cut`): what the box of a view shows, in the corner of its place in the batch. Here they get
their colours, and are enlarged, rotated and mirrored in one resampling. The same bits come out however the batch is cut: no
sample sees another. Labels are found in whole numbers, the same on every device; images may differ by a rounding between devices,
and the draws of noise are each kind of device's own.

Everything is fp32, also under autocast: only what is by itself, such as adding and scaling, and `grid_sample` is used.
"""

from dataclasses import replace
from math import floor

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.augment import Colour, View
from data.batch import Batch
from data.labels import LabelSet
from data.render import IMAGE_FILL, frame_to_output, mirrored

ONE = 1 << 16  # a pixel, of coordinates in whole numbers


def with_labels(batch: Batch, label_set: LabelSet, device: torch.device) -> Batch:
    """The training batch with its views' `labels`, uint8 (B, H, W), and `pixel_counts`, both on the device. One without `views`
    has them: it is returned as it is."""
    if batch.views is None:
        return batch
    patches = batch.labels.to(device, non_blocking=True)
    labels = patches.flatten(1).gather(1, _nearest(batch.views, device).flatten(1))
    same, mirror = np.arange(256, dtype=np.uint8), label_set.flip_table()
    tables = np.stack([mirror if view.flipped else same for view in batch.views])
    labels = _sent(tables, device).gather(1, labels.long()).view_as(patches)
    labels = labels.masked_fill(_outside(batch.views, device), label_set.ignore_index)
    rows = 256 * torch.arange(len(labels), device=device)
    counts = torch.bincount((labels.flatten(1) + rows[:, None]).flatten(), minlength=256 * len(labels))
    return replace(batch, labels=labels, pixel_counts=counts.view(-1, 256))


def images_on(batch: Batch, device: torch.device) -> Tensor:
    """uint8 (B, 3, H, W) on the device: the batch's images, or its views. One with `views` must be `with_labels`."""
    images = batch.images.to(device, non_blocking=True)
    if batch.views is None:
        return images
    images = _warped(_coloured(images.float(), [view.colour for view in batch.views]), batch.views)
    fill, outside = _sent(np.float32(IMAGE_FILL), device)[:, None, None], _outside(batch.views, device)
    images = torch.where(outside[:, None], fill, images)
    for row, view in enumerate(batch.views):
        if view.background or view.blur or view.noise:
            images[row] = torch.where(outside[row], fill, _degraded(images[row], batch.labels[row], view))
    return images.round_().clamp_(0, 255).to(torch.uint8, memory_format=torch.channels_last)


def _sent(values: np.ndarray | list, device: torch.device) -> Tensor:
    """What is small, without waiting until the device has done what it was given before. It may be freed at once: CUDA copies
    what is not pinned to memory of its own before it returns."""
    return torch.from_numpy(np.asarray(values)).to(device, non_blocking=True)


def _to_place(view: View, size: tuple[int, int]) -> np.ndarray:
    """float64 (2, 3): from points of the output to `view.place`, before rotation and flip, in pixels of which it has `size`
    (width, height)."""
    rotation, shift = frame_to_output(view)
    linear, place = rotation.T, view.place  # the transpose turns and mirrors back
    zoom = np.array(size) / place[2:]
    return zoom[:, None] * np.column_stack([linear, -linear @ shift - place[:2]])


def _whole_points(matrices: list[np.ndarray], size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Two int64 (B, H, W): where the pixels' centres of an output of `size` (H, W) come to, x and y, in 1 / ONE of a pixel."""
    centred = np.stack([np.column_stack([matrix[:, :2], matrix @ (0.5, 0.5, 1)]) for matrix in matrices])
    steps = _sent(np.round(centred * ONE).astype(np.int64), device)[..., None, None]  # (B, 2, 3, 1, 1)
    x, y = torch.arange(size[1], device=device), torch.arange(size[0], device=device)[:, None]
    return tuple(steps[:, i, 0] * x + steps[:, i, 1] * y + steps[:, i, 2] for i in range(2))


def _outside(views: list[View], device: torch.device) -> Tensor:
    """bool (B, H, W): not in the rotated and mirrored place."""
    x, y = _whole_points([_to_place(view, view.place[2:]) for view in views], views[0].size, device)
    ends = _sent([view.place[2:] for view in views], device)[..., None, None] * ONE
    return (x < 0) | (x >= ends[:, 0]) | (y < 0) | (y >= ends[:, 1])


def _nearest(views: list[View], device: torch.device) -> Tensor:
    """int64 (B, H, W): which pixel of an example's place in the batch, counted row by row, each label of its view is taken from;
    any where it lies outside."""
    height, width = views[0].size
    x, y = _whole_points([_to_place(view, view.label_patch) for view in views], (height, width), device)
    last = _sent([view.label_patch for view in views], device)[..., None, None] - 1
    x, y = (torch.minimum((axis // ONE).clamp_(min=0), last[:, i]) for i, axis in enumerate((x, y)))
    turned = _sent([view.degrees != 0 for view in views], device)[:, None, None]
    columns, rows = (_sent(np.stack(steps), device) for steps in zip(*map(_upright, views), strict=True))
    return torch.where(turned, y * width + x, rows[:, :, None] * width + columns[:, None, :])


def _upright(view: View) -> tuple[np.ndarray, np.ndarray]:
    """int64 (W,) and (H,): the patch's column and row of each of an unrotated output's. OpenCV tells them, for near the border
    between two pixels its choice is its version's own, and views are to be those of the CPU."""
    place, (width, height) = mirrored(view.place, view), view.label_patch
    columns, rows = (np.arange(length, dtype=np.float32) for length in (width, height))
    columns = cv2.resize(columns[None, :: -1 if view.flipped else 1], (place.width, 1), interpolation=cv2.INTER_NEAREST_EXACT)
    rows = cv2.resize(rows[:, None], (1, place.height), interpolation=cv2.INTER_NEAREST_EXACT)
    found = np.zeros(view.size[1], np.int64), np.zeros(view.size[0], np.int64)
    found[0][place.x : place.x + place.width], found[1][place.y : place.y + place.height] = columns[0], rows[:, 0]
    return found


def _warped(patches: Tensor, views: list[View]) -> Tensor:
    """float32 (B, 3, H, W): the places of a batch, whose corners hold patches -> its views, bilinear. Beyond its border a patch
    goes on for half a pixel: `render.cut` has seen to that."""
    height, width = views[0].size
    matrices = np.stack([_to_place(view, view.image_patch) for view in views]).astype(np.float32)
    matrices = _sent(matrices, patches.device)[..., None, None]
    x = torch.arange(width, device=patches.device) + 0.5
    y = torch.arange(height, device=patches.device)[:, None] + 0.5
    axes = []
    for i, length in enumerate((width, height)):
        at = matrices[:, i, 0] * x + matrices[:, i, 1] * y + matrices[:, i, 2]
        axes.append(at * (2 / length) - 1)
    return F.grid_sample(patches, torch.stack(axes, -1), mode="bilinear", padding_mode="border", align_corners=False)


def _coloured(images: Tensor, colours: list[Colour]) -> Tensor:
    """`render.distort_colours` of each of float32 (B, 3, H, W), which it may change. Each step gives whole gray levels, as there;
    but hue and saturation are not rounded on the way. What is not distorted comes out as it was, to the bit."""

    def column(values: list[float]) -> Tensor:
        return _sent(np.float32(values), images.device)[:, None, None, None]

    images = images.add_(column([floor(colour.brightness) for colour in colours])).clamp_(0, 255)
    images = _scaled(images, column([colour.contrast if colour.contrast_first else 1.0 for colour in colours]))
    rows = [row for row, colour in enumerate(colours) if colour.hue or colour.saturation != 1]
    if rows:
        saturation, turns = (column([getattr(colours[row], name) for row in rows])[:, 0] for name in ("saturation", "hue"))
        which = _sent(rows, images.device)
        images.index_copy_(0, which, _turned(images.index_select(0, which), saturation, turns / 180).round_())
    return _scaled(images, column([1.0 if colour.contrast_first else colour.contrast for colour in colours]))


def _scaled(images: Tensor, factors: Tensor) -> Tensor:
    return images.mul_(factors).clamp_(max=255).floor_()


def _turned(images: Tensor, saturation: Tensor, turns: Tensor) -> Tensor:
    """RGB of 0 to 255, float32 (n, 3, H, W): the saturation of HSV times (n, 1, 1), at most 1, the hue so many `turns` on."""
    value, (red, green, blue) = images.amax(1), images.unbind(1)
    chroma = value - images.amin(1)
    sixth = torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixth = torch.where(value == red, green - blue, sixth) / chroma.clamp(min=1) + 6 * turns  # of a turn; 0 is red
    chroma = torch.minimum(chroma * saturation, value)
    channels = []
    for start in (5, 3, 1):  # red, green, blue
        at = (sixth + start) % 6
        channels.append(value - chroma * torch.minimum(at, 4 - at).clamp_(0, 1))
    return torch.stack(channels, 1)


def _degraded(image: Tensor, label: Tensor, view: View) -> Tensor:
    """Another background, blur and noise: float32 (3, H, W), of a view with the labels uint8 (H, W)."""
    if view.background:
        background, cells = view.background
        clouds = np.random.default_rng(view.seed).integers(0, 256, (cells, cells, 3), np.uint8)
        clouds = _sent(clouds, image.device).permute(2, 0, 1)[None].float()
        clouds = F.interpolate(clouds, view.size, mode="bilinear", align_corners=False)[0]
        image = torch.where(label == background, clouds, image)
    if view.blur:
        image = _blurred(image, view.blur)
    if view.noise:
        generator = torch.Generator(image.device).manual_seed(view.seed)
        noise = torch.randn(image.shape, generator=generator, device=image.device)
        image = image + view.noise * noise
    return image


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """(3, H, W), by a Gaussian as wide as OpenCV's, which continues an image by its mirror."""
    size = round(6 * sigma + 1) | 1
    weights = cv2.getGaussianKernel(size, sigma).ravel().tolist()
    for axis in (1, 2):
        length = image.shape[axis]
        mirrored_border = np.pad(np.arange(length), size // 2, mode="reflect")
        wide = image.index_select(axis, _sent(mirrored_border, image.device))
        image = sum(weight * wide.narrow(axis, start, length) for start, weight in enumerate(weights))
    return image
