"""Fixed sine-cosine position tables for a grid of patches: Vaswani et al., arXiv:1706.03762, in two dimensions."""

import torch
from torch import Tensor

from mae.errors import ConfigError


def sincos_table(width: int, grid: tuple[int, int], prefix_tokens: int = 0) -> Tensor:
    """A (1, prefix_tokens + H * W, width) float32 table for a grid of (H, W) patches.

    The first half of the width encodes the column, the second the row, each as [sin | cos] over wavelengths from 2 pi
    to 10000 * 2 pi: the layout that the MAE checkpoints have. Prefix tokens (CLS, registers) get zeros.

    Raises ConfigError where the width is not a multiple of 4.
    """
    if width % 4:
        raise ConfigError(f"a sine-cosine position table needs a width that is a multiple of 4, not {width}: try {width + -width % 4}")
    rows, columns = torch.meshgrid(torch.arange(grid[0], dtype=torch.float64), torch.arange(grid[1], dtype=torch.float64), indexing="ij")
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]  # each (H * W, width / 4)
    table = torch.cat([f(angle) for angle in angles for f in (torch.sin, torch.cos)], dim=1)  # (H * W, width)
    return torch.cat([torch.zeros(prefix_tokens, width, dtype=torch.float64), table])[None].float()
