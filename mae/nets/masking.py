"""Which patches to hide: every masking scores the patches, and the lowest scores stay visible.

A scheme is one function `(keys, grid, hidden_share) -> scores (B, N)`. Scores are made on the keys' device, one stable sort
turns them into ids, so that every sample of a batch hides the same number of patches, whatever the scheme.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mae.nets import keyed

Scheme = Callable[[Tensor, tuple[int, int], float], Tensor]


class Split(NamedTuple):
    """The patches of each image, split in two."""

    visible: Tensor  # (B, V) int64 patch ids that the encoder sees
    hidden: Tensor  # (B, H) int64 patch ids to be predicted


def random(keys: Tensor, grid: tuple[int, int], hidden_share: float) -> Tensor:
    """Every subset of patches is equally likely (the paper's default)."""
    return keyed.uniform(keys, grid[0] * grid[1], "mask")


def block(keys: Tensor, grid: tuple[int, int], hidden_share: float) -> Tensor:
    """Hides rectangles of at least a 12th of the image and of aspect 0.3 to 3.3, one after another (after BEiT, arXiv:2106.08254)."""
    rectangles = 16
    height, width = grid
    draws = keyed.uniform(keys, 4 * rectangles + height * width, "mask")
    area, aspect, top, left = draws[:, : 4 * rectangles].view(-1, 4, rectangles).unbind(1)  # (B, R) each
    area = height * width * (1 / 12 + area * max(hidden_share / 2 - 1 / 12, 0))
    aspect = torch.exp((2 * aspect - 1) * math.log(1 / 0.3))
    h = (area * aspect).sqrt().round().clamp(1, height)
    w = (area / aspect).sqrt().round().clamp(1, width)
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    rows = torch.arange(height, device=keys.device)[None, None, :, None]
    columns = torch.arange(width, device=keys.device)[None, None, None, :]
    inside = (rows >= top[..., None, None]) & (rows < (top + h)[..., None, None])
    inside = inside & (columns >= left[..., None, None]) & (columns < (left + w)[..., None, None])  # (B, R, height, width)
    order = torch.arange(rectangles, device=keys.device)[None, :, None]
    covered_at = torch.where(inside.flatten(2), order, rectangles).amin(1)  # (B, N): the first rectangle over a patch
    # Patches covered first are hidden first; the noise settles ties inside the last rectangle and among uncovered patches.
    return rectangles - covered_at + draws[:, 4 * rectangles :]


def grid(keys: Tensor, grid: tuple[int, int], hidden_share: float) -> Tensor:
    """Keeps a regular lattice at a random offset: one patch of every 2 x 2 at 75% (the paper's Figure 6)."""
    height, width = grid
    spacing = max(round((1 - hidden_share) ** -0.5), 1)
    draws = keyed.uniform(keys, 2 + height * width, "mask")
    offset = (draws[:, :2] * spacing).floor()  # (B, 2)
    rows = torch.arange(height, device=keys.device)[None, :, None] - offset[:, 0, None, None]
    columns = torch.arange(width, device=keys.device)[None, None, :] - offset[:, 1, None, None]
    off_lattice = (rows % spacing != 0) | (columns % spacing != 0)
    return off_lattice.flatten(1) + draws[:, 2:]


SCHEMES = {"random": random, "block": block, "grid": grid}


def split_patches(scores: Tensor, hidden: int) -> Split:
    """Scores (B, N) -> the ids of the N - hidden lowest (visible) and of the `hidden` highest, in the order of their scores.

    The sort is stable, so that equal scores fall the same way on every device.
    """
    order = scores.argsort(dim=1, stable=True)
    return Split(visible=order[:, : scores.shape[1] - hidden], hidden=order[:, scores.shape[1] - hidden :])
