"""Pictures that several evaluators draw, as (H, W, 3) uint8."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mae.evaluation import canvas

MARGIN = 12  # pixels
CHARACTERS_AN_INCH = 15  # of captions
WRONG, BOX = "#b2182b", "#ff7f0e"  # of frames
HIDDEN = (0.80, 0.86, 0.95)  # the tint of pixels that are not there


def image_rows(
    rows: Sequence[tuple[str, np.ndarray]],
    *,
    caption: str = "",
    size: float = 0.9,
    heads: Mapping[int, str] = MappingProxyType({}),
    marked: Collection[tuple[int, int]] = (),
    boxes: Mapping[tuple[int, int], tuple[int, int, int, int]] = MappingProxyType({}),
) -> np.ndarray:
    """One titled row an entry, one column an image: arrays (N, H, W, 3) of colours, N the same in all; `size` inches an image.

    NaN pixels are tinted: nothing is known there. `heads`: words over columns, each from there on; `marked`: (row, column) of images
    that get a red frame; `boxes`: (row, column) -> (top, left, height, width) in an image's pixels, framed in it.
    """
    from matplotlib.patches import Rectangle

    count, height, width = rows[0][1].shape[:3]
    sheet, tall, wide, gap = _sheet([images for _, images in rows])
    lines = textwrap.wrap(caption, max(int(CHARACTERS_AN_INCH * size * count), 60))
    axis = _placed(
        left=0.15 * max(len(line) for title, _ in rows for line in title.split("\n")) + 0.4,
        across=size * count,
        right=max((len(line) / CHARACTERS_AN_INCH for line in lines), default=0.0),
        down=size * len(rows) * height / width,
        below=0.2 + 0.2 * len(lines),
    )
    axis.imshow(sheet, interpolation="antialiased", aspect="auto")
    _bare(axis)
    axis.set_yticks([(i + 0.5) * tall - gap / 2 for i in range(len(rows))], [title for title, _ in rows], fontsize=10)
    axis.tick_params(length=0)
    for column, words in heads.items():
        axis.text(column * wide, -gap, words, fontsize=9, va="bottom")
    for i, j in marked:
        corner, sides = (j * wide - gap / 4, i * tall - gap / 4), (wide - gap / 2, tall - gap / 2)
        axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=WRONG, linewidth=1.6, clip_on=False))
    dots = (tall - gap) // height  # a pixel
    for (i, j), (top, left, h, w) in boxes.items():
        corner, sides = (j * wide + left * dots - 0.5, i * tall + top * dots - 0.5), (w * dots, h * dots)
        axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=BOX, linewidth=1.2))
    axis.annotate("\n".join(lines), (0, 0), (0, -8), "axes fraction", "offset points", fontsize=8, color="#555555", va="top")
    return _trimmed(canvas.rendered(axis.figure))


def _sheet(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, int, int, int]:
    """All images on white, and of each with the gap after it the height, the width, and that of the gap, in dots."""
    count, height, width = rows[0].shape[:3]
    fine = max(1, 96 // max(height, width))  # small pixels are enlarged, so that gaps may be thinner than they are
    gap = max(1, fine * max(height, width) // 16)
    tall, wide = fine * height + gap, fine * width + gap
    sheet = np.ones((tall * len(rows) - gap, wide * count - gap, 3))
    for i, images in enumerate(rows):
        for j, image in enumerate(images):
            known = np.where(np.isnan(image), HIDDEN, image)
            sheet[i * tall : (i + 1) * tall - gap, j * wide : (j + 1) * wide - gap] = known.repeat(fine, 0).repeat(fine, 1)
    return sheet, tall, wide, gap


def _placed(*, left: float, across: float, right: float, down: float, below: float, above: float = 0.3) -> Any:
    """One axis of a given size (inches), which all images share since laying out a hundred takes seconds, amid ample margins.

    `right`: how far what is written under it may reach, from its left side on.
    """
    from matplotlib.figure import Figure

    wide, tall = left + max(across, right) + 0.2, above + down + below
    return Figure(figsize=(wide, tall)).add_axes((left / wide, below / tall, across / wide, down / tall))


def matrix(values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str) -> np.ndarray:
    """Values (R, C) from 0 to 1 as a table of shaded cells with their values."""
    figure = canvas.blank(0.42 * len(columns) + 1.4, 0.42 * len(rows) + 1.1)
    axis = figure.subplots()
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    _bare(axis)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    for i, j in np.ndindex(values.shape):
        shown = f"{values[i, j]:.2f}".removeprefix("0").replace("1.00", "1")
        axis.text(j, i, shown, ha="center", va="center", fontsize=7, color="white" if values[i, j] > 0.6 else "black")
    figure.suptitle(title, fontsize=10)
    return canvas.rendered(figure)


def _trimmed(picture: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) with the same narrow white margin on all sides."""
    drawn = np.any(picture < 255, axis=2)
    rows, columns = (np.flatnonzero(np.any(drawn, axis=axis)) for axis in (1, 0))
    inside = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return np.pad(inside, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)


def _bare(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
