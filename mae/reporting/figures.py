"""Pictures of what a run does, as PNG files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def image_rows(columns: Mapping[str, np.ndarray], file: Path, *, caption: str = "") -> None:
    """One row an image, one titled column a stage: arrays (N, H, W, C) of floats in [0, 1] with C = 1 or 3, N rows of them.

    Other channel counts show the mean of the channels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(next(iter(columns.values())))
    height, width = next(iter(columns.values())).shape[1:3]
    across = 1.3 * len(columns)
    figure, axes = pyplot.subplots(
        count, len(columns), figsize=(across, 1.3 * count * height / width + 0.5), squeeze=False, layout="constrained"
    )
    for j, (title, images) in enumerate(columns.items()):
        for i, image in enumerate(images):
            shown = image if image.shape[2] == 3 else image.mean(2)
            axes[i, j].imshow(np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes[i, j].set_axis_off()
        axes[0, j].set_title(title, fontsize=9)
    if caption:
        figure.supxlabel(caption, fontsize=7)
    figure.savefig(file, dpi=160)
    pyplot.close(figure)
