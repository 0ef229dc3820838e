"""Pictures of what a run does, as PNG files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

HIDDEN = (0.80, 0.86, 0.95)  # the tint of pixels that are not there


def image_grid(rows: Mapping[str, np.ndarray], file: Path, *, caption: str = "") -> None:
    """One titled row a stage, one column an image: arrays (N, H, W, C) of floats in [0, 1], N the same in all.

    NaN pixels are tinted: nothing is known there. Channel counts other than 3 show the mean of the channels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count, height, width = next(iter(rows.values())).shape[:3]
    size = 1.1
    figure, axes = pyplot.subplots(
        len(rows),
        count,
        figsize=(size * count + 1, size * len(rows) * height / width + (0.3 if caption else 0)),
        squeeze=False,
        layout="constrained",
    )
    for i, (title, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            colours = image if image.shape[2] == 3 else np.repeat(image.mean(2, keepdims=True), 3, axis=2)
            shown = np.where(np.isnan(colours), HIDDEN, np.clip(colours, 0, 1))
            axes[i, j].imshow(shown, interpolation="nearest")
            axes[i, j].set(xticks=[], yticks=[])
            axes[i, j].spines[:].set_visible(False)
        axes[i, 0].set_ylabel(title, rotation=0, ha="right", va="center", fontsize=10)
    if caption:
        figure.supxlabel(caption, fontsize=8)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
