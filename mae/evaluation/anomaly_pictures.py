"""Heat maps: a few test images, normal and not, and where each is unusual."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mae.data.sources import Subset
from mae.evaluation import canvas
from mae.evaluation.material import draw_order
from mae.evaluation.subject import Subject

NORMAL, ANOMALOUS = 3, 5  # images that are shown
COLOURS = {False: "#1b7837", True: "#b2182b"}  # of the titles: normal, anomalous


def choose(labels: np.ndarray, anomalous: np.ndarray, seed: int) -> np.ndarray:
    """Ids of normal images, then of anomalous ones of as many classes as there are: labels (N,), anomalous (N,) bool."""
    order = draw_order(len(labels), seed).numpy()
    normal, odd = order[~anomalous[order]], order[anomalous[order]]
    turn = np.array([int((labels[odd[:i]] == labels[odd[i]]).sum()) for i in range(len(odd))])  # its class was drawn so often before
    odd = odd[np.argsort(turn, kind="stable")][:ANOMALOUS]
    return np.concatenate([normal[:NORMAL], odd[np.argsort(labels[odd], kind="stable")]])


def images_of(subject: Subject, ids: np.ndarray) -> Tensor:
    """Those test images (n, C, H, W), normalised."""
    return torch.cat([images for images, _ in subject.batches(Subset(subject.splits.test_images, ids))])


def draw(
    rows: Mapping[str, np.ndarray],
    maps: Tensor,
    *,
    titles: list[str],
    anomalous: np.ndarray,
    limits: tuple[float, float],
    masks: np.ndarray | None,
    caption: str,
) -> np.ndarray:
    """Rows of colours (n, H, W, 3), the first one again under the heat maps (n, H, W), one titled column an image.

    Maps are coloured between the limits; the outline of the anomaly is drawn on the first row where masks (n, H, W) are known.
    """
    count, height, width = maps.shape
    size = 1.35
    figure = canvas.blank(size * count + 1.6, size * height / width * (len(rows) + 1) + 0.5)
    axes = figure.subplots(len(rows) + 1, count, squeeze=False)
    first = next(iter(rows.values()))
    for j in range(count):
        for axis, (label, images) in zip(axes[:, j], rows.items(), strict=False):
            axis.imshow(images[j], interpolation="nearest")
            if j == 0:
                axis.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        if masks is not None and masks[j].any():
            across, down = np.arange(-1, width + 1), np.arange(-1, height + 1)  # one more on each side: outlines are closed
            axes[0, j].contour(across, down, np.pad(masks[j], 1), [0.5], colors=COLOURS[True], linewidths=1.2)
            axes[0, j].set(xlim=(-0.6, width - 0.4), ylim=(height - 0.4, -0.6))
        axes[0, j].set_title(titles[j], fontsize=8, color=COLOURS[bool(anomalous[j])])
        axes[-1, j].imshow(first[j].mean(2), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        heat = axes[-1, j].imshow(maps[j].cpu().numpy(), cmap="inferno", vmin=limits[0], vmax=limits[1], alpha=0.7, interpolation="nearest")
    axes[-1, 0].set_ylabel("score", rotation=0, ha="right", va="center", fontsize=9)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(heat, ax=axes[-1].tolist(), fraction=0.02, pad=0.01)
    bar.ax.tick_params(labelsize=7)
    if caption:
        figure.supxlabel(caption, fontsize=8, color="#555555")
    return canvas.rendered(figure)
