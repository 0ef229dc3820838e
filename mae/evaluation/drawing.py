"""Pictures that several evaluators draw, as (H, W, 3) uint8."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from mae.evaluation import canvas

WRONG = "#b2182b"  # of frames
HIDDEN = (0.80, 0.86, 0.95)  # the tint of pixels that are not there


def image_rows(
    rows: Sequence[tuple[str, np.ndarray]],
    *,
    caption: str = "",
    size: float = 0.9,
    heads: Mapping[int, str] = MappingProxyType({}),
    marked: Collection[tuple[int, int]] = (),
) -> np.ndarray:
    """One titled row an entry, one column an image: arrays (N, H, W, 3) of colours, N the same in all; `size` inches an image.

    NaN pixels are tinted: nothing is known there. `heads`: words over columns, each from there on; `marked`: (row, column) of images
    that get a red frame.
    """
    from matplotlib.patches import Rectangle

    count, height, width = rows[0][1].shape[:3]
    fine = max(1, 96 // max(height, width))  # small pixels are enlarged, so that gaps may be thinner than they are
    gap = max(1, fine * max(height, width) // 16)
    tall, wide = fine * height + gap, fine * width + gap
    sheet = np.ones((tall * len(rows) - gap, wide * count - gap, 3))
    for i, (_, images) in enumerate(rows):
        for j, image in enumerate(images):
            known = np.where(np.isnan(image), HIDDEN, image)
            sheet[i * tall : (i + 1) * tall - gap, j * wide : (j + 1) * wide - gap] = known.repeat(fine, 0).repeat(fine, 1)
    longest = max(len(line) for title, _ in rows for line in title.split("\n"))
    lines = 0.05 + 0.2 * len(caption.split("\n")) * bool(caption) + 0.3 * bool(heads)
    figure = canvas.blank(size * count + 0.076 * longest + 0.3, size * len(rows) * height / width + lines)
    axis = figure.subplots()  # one for all: laying out a hundred takes seconds
    axis.imshow(sheet, interpolation="antialiased")
    _bare(axis)
    axis.set_yticks([(i + 0.5) * tall - gap / 2 for i in range(len(rows))], [title for title, _ in rows], fontsize=10)
    axis.tick_params(length=0)
    for column, words in heads.items():
        axis.text(column * wide, -gap, words, fontsize=9, va="bottom")
    for i, j in marked:
        corner, sides = (j * wide - gap / 4, i * tall - gap / 4), (wide - gap / 2, tall - gap / 2)
        axis.add_patch(Rectangle(corner, *sides, fill=False, edgecolor=WRONG, linewidth=1.6, clip_on=False))
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#555555")
    return canvas.rendered(figure)


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


def _bare(axis: Any) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
