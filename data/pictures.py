"""Pictures for people: masks in the class colours, contact sheets with a legend."""

from pathlib import Path

import cv2
import numpy as np

from data.labels import LabelSet

INK, PAPER = (30, 30, 30), (255, 255, 255)
FONT = cv2.FONT_HERSHEY_SIMPLEX


def contact_sheet(
    rows: list[list[np.ndarray]], titles: list[str], label_set: LabelSet, tile: int = 192, captions: list[str] | None = None
) -> np.ndarray:
    """RGB uint8 (h, w, 3): examples two abreast, under `titles`, and the legend of the classes that occur.

    Args:
        rows: one list an example, of RGB images uint8 (h, w, 3) and masks of class ids uint8 (h, w), len(titles) each.
        tile: every cell is fitted into a square of so many pixels.
        captions: a line above each example.
    """
    columns = 2 if len(rows) > 1 else 1
    palette = label_set.palette()
    examples = [np.hstack([_tile(cell, tile, palette) for cell in row]) for row in rows]
    for i, caption in enumerate(captions or []):
        examples[i] = np.vstack([_line(caption, examples[i].shape[1], 0.42), examples[i]])
    if len(examples) % columns:
        examples.append(np.full_like(examples[0], 255))
    grid = np.vstack([np.hstack(examples[i : i + columns]) for i in range(0, len(examples), columns)])
    heading = np.hstack([_line(title, tile, 0.5) for title in titles * columns])
    shown = {int(value) for row in rows for cell in row if cell.ndim == 2 for value in np.unique(cell)}
    return np.vstack([heading, grid, _legend(label_set, shown, grid.shape[1])])


def resized(cell: np.ndarray, side: int) -> np.ndarray:
    """An RGB image (h, w, 3) or a mask of class ids (h, w), uint8, with a longer side of so many pixels."""
    height, width = cell.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if cell.ndim == 2:
        return cv2.resize(cell, size, interpolation=cv2.INTER_NEAREST_EXACT)
    return cv2.resize(cell, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def save_png(path: Path, image: np.ndarray) -> None:
    """Write an RGB uint8 image. Raises OSError naming `path` when it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); choose another place for it") from None


def _tile(cell: np.ndarray, side: int, palette: np.ndarray) -> np.ndarray:
    cell = resized(cell, side)
    if cell.ndim == 2:
        cell = palette[cell]
    tile = np.full((side, side, 3), 255, np.uint8)
    y, x = (side - cell.shape[0]) // 2, (side - cell.shape[1]) // 2
    tile[y : y + cell.shape[0], x : x + cell.shape[1]] = cell
    return tile


def _line(text: str, width: int, scale: float) -> np.ndarray:
    line = np.full((28, width, 3), 255, np.uint8)
    cv2.putText(line, text, (6, 20), FONT, scale, INK, 1, cv2.LINE_AA)
    return line


def _legend(label_set: LabelSet, shown: set[int], width: int) -> np.ndarray:
    entries = [(label_set.classes[i], label_set.colors[i]) for i in range(label_set.num_classes) if i in shown]
    if label_set.ignore_index in shown:
        entries.append(("(ignored)", PAPER))
    per_line = max(1, width // 150)
    lines = -(-len(entries) // per_line)
    legend = np.full((lines * 22 + 10, width, 3), 255, np.uint8)
    for i, (name, color) in enumerate(entries):
        x, y = (i % per_line) * 150 + 6, (i // per_line) * 22 + 8
        cv2.rectangle(legend, (x, y), (x + 14, y + 14), tuple(int(v) for v in color), -1)
        cv2.rectangle(legend, (x, y), (x + 14, y + 14), INK, 1)
        cv2.putText(legend, name, (x + 20, y + 12), FONT, 0.42, INK, 1, cv2.LINE_AA)
    return legend
