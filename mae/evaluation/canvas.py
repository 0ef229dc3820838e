"""What evaluators draw on: figures that no window or global state knows of, and images as colours."""

from typing import Any

import numpy as np
from torch import Tensor

from mae.config import Config

REACH = 3  # standard deviations of the data on either side of their mean, from black to white
NARROW = 0.5  # of 0 to 1: 8-bit data that vary by less are all black, or all grey, to the eye


def blank(width: float, height: float) -> Any:
    """An empty matplotlib Figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: Any, *, dots_per_inch: int = 150) -> np.ndarray:
    """The figure as (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dots_per_inch)
    agg = FigureCanvasAgg(figure)
    agg.draw()
    return np.asarray(agg.buffer_rgba())[..., :3].copy()


def colours(images: Tensor, config: Config) -> np.ndarray:
    """Normalised images (B, C, H, W) as colours (B, H, W, 3) in [0, 1]; other channels than three are shown as their mean, in grey.

    8-bit pixels have the brightness of their file. Other numbers have no black and no white of their own: see `captioned`.
    """
    mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (config.data.mean, config.data.std))
    shown = images / (2 * REACH) + 0.5 if _stretched(config) else images * std + mean
    pixels = shown.clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
    return pixels if pixels.shape[3] == 3 else np.repeat(pixels.mean(3, keepdims=True), 3, axis=3)


def captioned(words: str, config: Config) -> str:
    """The caption of a picture of such colours: the words, and what has to be said of how the pixels are shown, mostly nothing."""
    stretched = f"black to white: mean - {REACH} to mean + {REACH} standard deviations of the data" if _stretched(config) else ""
    grey = f"grey: the mean of {config.data.channels} channels" if config.data.channels not in (1, 3) else ""
    return "; ".join(part for part in (words, stretched, grey) if part)


def _stretched(config: Config) -> bool:
    """Whether pixels need not fill 0 to 1: those of data.name=arrays, and 8-bit ones that vary by less than a few levels."""
    return config.data.name == "arrays" or 2 * REACH * max(config.data.std) < NARROW
