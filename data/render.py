"""A drawn view (`data.augment`) to pixels, written in place into the rows of a batch.

All coordinates are continuous: a pixel's centre lies at +0.5, so that image and mask stay together at any scale.
"""

from math import floor

import cv2
import numpy as np

from data.augment import Box, Colour, View

IMAGE_FILL = (124, 116, 104)  # the normalisation mean: nothing once normalised
MARGIN = 2  # pixels of its border that a warp and an enlargement reach beyond it
FIXED_POINT = 4  # fractional bits of polygon corners


def render(
    image: np.ndarray,
    label: np.ndarray,
    view: View,
    flip_table: np.ndarray,
    ignore_index: int,
    out_image: np.ndarray,
    out_label: np.ndarray,
) -> None:
    """Writes one view of a training pair.

    Args:
        image: RGB uint8 (h', w', 3), of the label's size or decoded at 1/2, 1/4 ... 1/`view.shrink` of it, rounded up.
        label: class ids uint8 (h, w), those that `view` was drawn from.
        flip_table: uint8 (256,), the class of each class in a mirrored image.
        out_image: C-contiguous RGB uint8 (H, W, 3); IMAGE_FILL where the view shows nothing of the source (to half a
            pixel along slanted edges), whatever the colours, blur and noise.
        out_label: C-contiguous uint8 (H, W); ignore_index there.
    """
    if view.faithful:
        assert image.shape[:2] == label.shape, "a faithful view has no use for an image decoded smaller"
        _draw_step_by_step(image, label, view, flip_table, ignore_index, out_image, out_label)
    else:
        _draw_image(image, _shrunk_by(image, label), view, out_image)
        _draw_label(label, view, flip_table, ignore_index, out_label)
        _fill_outside(out_image, view, IMAGE_FILL)
        _fill_outside(out_label, view, ignore_index)
    if view.background or view.blur or view.noise:
        _degrade(out_image, out_label, view)
        _fill_outside(out_image, view, IMAGE_FILL)


def cut(image: np.ndarray, label: np.ndarray, view: View, out_image: np.ndarray, out_label: np.ndarray) -> None:
    """The part of a view that workers do where `data.device_render` does the rest: writes what the box shows, neither enlarged
    nor turned, into the upper left corners of `out_image`, (height, width) `view.image_patch`, and of `out_label`, which are as
    `render` wants them. What is beyond stays as it is, but for a pixel that the image's right and lower border is continued
    by: an enlargement reaches half a pixel beyond it."""
    patch = _patch(image, _shrunk_by(image, label), view)
    width, height = view.image_patch
    assert patch.shape == (height, width, 3)
    rows, columns = min(height + 1, len(out_image)), min(width + 1, out_image.shape[1])
    out_image[:height, :width] = patch
    out_image[height:rows, :width] = patch[-1:]
    out_image[:rows, width:columns] = out_image[:rows, width - 1 : width]
    Box(0, 0, *view.label_patch).of(out_label)[:] = _label_patch(label, view)


def resize_for_validation(image: np.ndarray, size: tuple[int, int], keep_aspect: bool) -> tuple[np.ndarray, Box]:
    """RGB uint8 (h, w, 3) -> (H, W, 3), bilinear, and where in it the image lies: in the middle, the rest being
    IMAGE_FILL, if its shape is kept; else everywhere (as the original evaluates)."""
    height, width = size
    if keep_aspect:
        ratio = min(height / image.shape[0], width / image.shape[1])
        height, width = max(1, round(image.shape[0] * ratio)), max(1, round(image.shape[1] * ratio))
    place = Box((size[1] - width) // 2, (size[0] - height) // 2, width, height)
    out = np.full((*size, 3), IMAGE_FILL, np.uint8)
    cv2.resize(image, (width, height), dst=place.of(out), interpolation=cv2.INTER_LINEAR)
    return out, place


def _shrunk_by(image: np.ndarray, label: np.ndarray) -> int:
    for factor in (1, 2, 4, 8):
        if image.shape[:2] == tuple(-(-length // factor) for length in label.shape):
            return factor
    raise AssertionError(f"image {image.shape} of no scale of its label {label.shape}")


def _draw_image(image: np.ndarray, shrunk_by: int, view: View, out: np.ndarray) -> None:
    patch = distort_colours(_patch(image, shrunk_by, view), view.colour)
    if view.degrees == 0:
        target = mirrored(view.place, view).of(out)
        _resize_into(target, cv2.flip(patch, 1) if view.flipped else patch, cv2.INTER_LINEAR)
        return
    # OpenCV enlarges five times as fast as it warps, so turn at the patch's own resolution.
    zoom = max(1.0, min(view.place.width / patch.shape[1], view.place.height / patch.shape[0]))
    canvas = np.empty((round(view.size[0] / zoom), round(view.size[1] / zoom), 4), np.uint8)
    matrix = _patch_to(canvas, patch, view)
    matrix[:, 2] -= matrix[:, :2] @ (MARGIN, MARGIN)
    cv2.warpAffine(_with_margin(patch), matrix, canvas.shape[1::-1], dst=canvas, flags=cv2.INTER_LINEAR)
    _resize_into(out, cv2.cvtColor(canvas, cv2.COLOR_RGBA2RGB), cv2.INTER_LINEAR)


def _with_margin(patch: np.ndarray) -> np.ndarray:
    """RGBA, for OpenCV warps four channels in half the time of three, and with its border continued a little: warped
    with all of it continued takes twice as long, with none the surroundings bleed into the outermost pixels."""
    height, width = patch.shape[:2]
    padded = np.empty((height + 2 * MARGIN, width + 2 * MARGIN, 4), np.uint8)
    cv2.cvtColor(patch, cv2.COLOR_RGB2RGBA, dst=padded[MARGIN:-MARGIN, MARGIN:-MARGIN])
    padded[:MARGIN], padded[-MARGIN:] = padded[MARGIN], padded[-MARGIN - 1]
    padded[:, :MARGIN], padded[:, -MARGIN:] = padded[:, MARGIN, None], padded[:, -MARGIN - 1, None]
    return padded


def _patch(image: np.ndarray, shrunk_by: int, view: View) -> np.ndarray:
    """What the box shows, at the smaller of its own resolution and `view.seen`."""
    patch = Box(*(length // shrunk_by for length in view.box)).of(image)
    if view.unit > shrunk_by:
        units = view.box.width // view.unit, view.box.height // view.unit
        patch = cv2.resize(patch, units, interpolation=cv2.INTER_AREA)
    height, width = patch.shape[:2]
    seen = view.image_patch
    if seen == (width, height):
        return patch
    alias_free = width <= 2 * seen[0] and height <= 2 * seen[1]
    return cv2.resize(patch, seen, interpolation=cv2.INTER_LINEAR if alias_free else cv2.INTER_AREA)


def _label_patch(label: np.ndarray, view: View) -> np.ndarray:
    patch, size = view.box.of(label), view.label_patch
    return patch if size == view.box[2:] else cv2.resize(patch, size, interpolation=cv2.INTER_NEAREST_EXACT)


def _draw_label(label: np.ndarray, view: View, flip_table: np.ndarray, ignore_index: int, out: np.ndarray) -> None:
    patch = view.box.of(label) if view.degrees else _label_patch(label, view)
    place = mirrored(view.place, view)
    swap_first = view.flipped and patch.size <= out.size
    if swap_first:
        patch = cv2.LUT(patch, flip_table)
    if view.degrees:
        matrix, nearest = _patch_to(out, patch, view), cv2.INTER_NEAREST
        cv2.warpAffine(patch, matrix, out.shape[1::-1], dst=out, flags=nearest, borderValue=ignore_index)
    else:
        _resize_into(place.of(out), cv2.flip(patch, 1) if view.flipped else patch, cv2.INTER_NEAREST_EXACT)
    if view.flipped and not swap_first:
        cv2.LUT(out, flip_table, dst=out)


def _resize_into(out: np.ndarray, source: np.ndarray, interpolation: int) -> np.ndarray:
    return cv2.resize(source, out.shape[1::-1], dst=out, interpolation=interpolation)


def _patch_to(out: np.ndarray, patch: np.ndarray, view: View) -> np.ndarray:
    """(2, 3), as OpenCV wants it: from the patch, which fills `view.place`, rotated and mirrored, to `out`, which is
    the whole output in any resolution."""
    rotation, shift = frame_to_output(view)
    zoom = view.place.width / patch.shape[1], view.place.height / patch.shape[0]
    resolution = np.array([out.shape[1] / view.size[1], out.shape[0] / view.size[0]])
    linear = resolution[:, None] * rotation * zoom
    shift = resolution * (rotation @ view.place[:2] + shift)
    shift += linear @ (0.5, 0.5) - 0.5  # OpenCV's pixels have their centres at whole numbers
    return np.column_stack([linear, shift])


def frame_to_output(view: View) -> tuple[np.ndarray, np.ndarray]:
    """(2, 2) and (2,): the rotation about the output's centre, then the flip."""
    angle, side = np.deg2rad(view.degrees), -1 if view.flipped else 1
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[side * cos, -side * sin], [sin, cos]])
    centre = np.array([view.size[1] / 2, view.size[0] / 2])
    return rotation, centre - rotation @ centre


def mirrored(place: Box, view: View) -> Box:
    return place._replace(x=view.size[1] - place.x - place.width) if view.flipped else place


def _fill_outside(out: np.ndarray, view: View, value: int | tuple[int, int, int]) -> None:
    """Fills all but the rotated and mirrored `view.place`."""
    height, width = view.size
    if view.degrees == 0 and view.place == (0, 0, width, height):
        return
    x, y, w, h = view.place
    left, top, right, bottom = x - 0.5, y - 0.5, x + w + 0.5, y + h + 0.5  # OpenCV fills the outline as well
    rotation, shift = frame_to_output(view)
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]]) @ rotation.T + shift - 0.5
    beyond = np.array([[-9, -9], [width + 9, -9], [width + 9, height + 9], [-9, height + 9]])
    # Two polygons, one in the other: what lies between them is filled.
    polygons = [np.round(polygon * 2**FIXED_POINT).astype(np.int32) for polygon in (beyond, corners)]
    cv2.fillPoly(out, polygons, value, shift=FIXED_POINT)


def distort_colours(image: np.ndarray, colour: Colour) -> np.ndarray:
    """An RGB uint8 image, distorted. May return its argument, never changes it."""
    if colour.brightness:
        change = cv2.add if colour.brightness > 0 else cv2.subtract  # a negative scalar would be added slowly
        image = change(image, (abs(floor(colour.brightness)),) * 3 + (0,))
    if colour.contrast_first:
        image = _scaled(image, colour.contrast)
    if colour.hue or colour.saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # 256 hues: uint8 wraps as they do
        if colour.saturation != 1:
            hsv = cv2.transform(hsv, np.diag([1.0, colour.saturation, 1.0]))
        if colour.hue:
            rows = hsv.reshape(len(hsv), -1)
            rows += np.tile(np.array([round(colour.hue * 256 / 180) % 256, 0, 0], np.uint8), hsv.shape[1])
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image if colour.contrast_first else _scaled(image, colour.contrast)


def _scaled(image: np.ndarray, factor: float) -> np.ndarray:
    """Times `factor`, truncated: rounded, that is, after half a gray level less."""
    return image if factor == 1 else cv2.convertScaleAbs(image, alpha=factor, beta=-0.5)


def _degrade(out: np.ndarray, label: np.ndarray, view: View) -> None:
    """Another background, blur and noise."""
    rng = np.random.default_rng(view.seed)
    if view.background:
        background, cells = view.background
        clouds = rng.integers(0, 256, (cells, cells, 3), np.uint8)
        clouds = cv2.resize(clouds, out.shape[1::-1], interpolation=cv2.INTER_LINEAR)
        cv2.copyTo(clouds, (label == background).view(np.uint8), dst=out)
    if view.blur:
        cv2.GaussianBlur(out, (0, 0), view.blur, dst=out)
    if view.noise:
        noise = rng.standard_normal(out.shape, np.float32) * np.float32(view.noise)
        cv2.add(out, noise, dst=out, dtype=cv2.CV_8U)


def _draw_step_by_step(
    image: np.ndarray,
    label: np.ndarray,
    view: View,
    flip_table: np.ndarray,
    ignore_index: int,
    out_image: np.ndarray,
    out_label: np.ndarray,
) -> None:
    """The same view by the original's steps: crop, resize, resize to the input, rotate, flip, distort. Better than
    there: shrinking averages, and masks are not moved against their images."""
    height, width = view.size
    image, label = view.box.of(image), view.box.of(label)
    for size in (view.seen, (view.place.width, view.place.height)):
        shrinks = size[0] < image.shape[1] or size[1] < image.shape[0]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
    shown = np.zeros(view.size, np.uint8)
    out_image[:], out_label[:] = IMAGE_FILL, ignore_index
    for out, pixels in ((out_image, image), (out_label, label), (shown, 1)):
        view.place.of(out)[:] = pixels
    if view.degrees:
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -view.degrees, 1)
        out_image[:] = cv2.warpAffine(out_image, turn, (width, height), borderValue=IMAGE_FILL)
        for out, fill in ((out_label, ignore_index), (shown, 0)):
            out[:] = cv2.warpAffine(out, turn, (width, height), flags=cv2.INTER_NEAREST, borderValue=fill)
    if view.flipped:
        for out in (out_image, out_label, shown):
            out[:] = out[:, ::-1].copy()
        out_label[:] = flip_table[out_label]
    out_image[:] = _distort_step_by_step(out_image, view.colour)
    out_image[shown == 0] = IMAGE_FILL


def _distort_step_by_step(image: np.ndarray, colour: Colour) -> np.ndarray:
    def scaled(values: np.ndarray, factor: float, shift: float) -> np.ndarray:
        return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    image = scaled(image, 1.0, colour.brightness)
    if colour.contrast_first:
        image = scaled(image, colour.contrast, 0.0)
    if colour.hue or colour.saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + colour.hue) % 180
        hsv[..., 1] = scaled(hsv[..., 1], colour.saturation, 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if colour.contrast_first else scaled(image, colour.contrast, 0.0)
