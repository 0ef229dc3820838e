"""Random resized crops and flips that are a pure function of the sample's key (boxes as in torchvision's RandomResizedCrop).

Only +, -, *, / and square roots of float64 are used, one at a time, which IEEE 754 rounds alike everywhere: a box does not
depend on the machine, the batch around the sample, or the process that computes it.
"""

import numpy as np
from PIL import Image

TRIES = 10
LOG_RATIO = 0.28768207245178093  # log(4/3): the crop's aspect is log-uniform in [3/4, 4/3]

BICUBIC, NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST


def boxes(keys: np.ndarray, heights: np.ndarray, widths: np.ndarray, *, scale: tuple[float, float], aspect: float = 1.0) -> np.ndarray:
    """(B, 4) int64: top, left, height and width of each sample's crop, in pixels.

    `keys` (B,) int64; `heights`, `widths` (B,) pixels of the images; `scale`: share of the area, [least, most];
    `aspect`: width / height of what the crop is resized to, which the 3/4 to 4/3 are relative to. A scale of [1, 1]
    is the largest centred box of that aspect, the same for every key.
    """
    from mae.nets.keyed import uniform_numpy  # torch comes with it

    tall, wide = np.asarray(heights, np.int64)[:, None], np.asarray(widths, np.int64)[:, None]  # (B, 1)
    low, high = scale
    if low == high == 1:
        height, width = _largest(tall, wide, aspect, aspect)
        return np.concatenate([(tall - height) // 2, (wide - width) // 2, height, width], axis=1)
    numbers = uniform_numpy(keys, 2 * TRIES + 2, "crop").astype(np.float64)
    area = tall * wide * (low + (high - low) * numbers[:, :TRIES])  # (B, TRIES)
    ratio = aspect * _exp(LOG_RATIO * (2 * numbers[:, TRIES : 2 * TRIES] - 1))
    width, height = np.rint(np.sqrt(area * ratio)).astype(np.int64), np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (width > 0) & (width <= wide) & (height > 0) & (height <= tall)
    first = fits.argmax(axis=1)[:, None]
    height, width = np.take_along_axis(height, first, axis=1), np.take_along_axis(width, first, axis=1)
    top = np.floor(numbers[:, -2:-1] * (tall - height + 1)).astype(np.int64)
    left = np.floor(numbers[:, -1:] * (wide - width + 1)).astype(np.int64)
    tallest, widest = _largest(tall, wide, aspect * 3 / 4, aspect * 4 / 3)
    centred = np.concatenate([(tall - tallest) // 2, (wide - widest) // 2, tallest, widest], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), np.concatenate([top, left, height, width], axis=1), centred)


def flips(keys: np.ndarray) -> np.ndarray:
    """(B,) bool: which samples are mirrored, half of them."""
    from mae.nets.keyed import uniform_numpy

    return uniform_numpy(keys, 1, "flip")[:, 0] < 0.5


def central(image: np.ndarray, size: tuple[int, int], factor: float, by: Image.Resampling = BICUBIC) -> np.ndarray:
    """What evaluation sees: the image scaled to cover factor x size, and of that the central size: (h, w, C), uint8 or float32 as it is.

    For a square, torchvision's Resize(round(factor x size)) and CenterCrop(size). `factor` >= 1. Classes of pixels are taken
    `by` NEAREST, for their mean means nothing.
    """
    (tall, wide), (height, width) = image.shape[:2], size
    cover = round(height * factor), round(width * factor)
    by_width = cover[0] * wide <= cover[1] * tall  # else the height is what only just covers
    scaled = (int(cover[1] * tall / wide), cover[1]) if by_width else (cover[0], int(cover[0] * wide / tall))
    top, left = round((scaled[0] - height) / 2), round((scaled[1] - width) / 2)
    y, x = tall / scaled[0], wide / scaled[1]  # source pixels a scaled pixel
    return resize(image, size, (left * x, top * y, (left + width) * x, (top + height) * y), by)


def resize(
    image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float] | None = None, by: Image.Resampling = BICUBIC
) -> np.ndarray:
    """Pillow's antialiased bicubic, or `by` another filter: image (H, W, C), or its (left, top, right, bottom), to size (h, w).

    uint8 or float32, as it is. Equal sizes: equal pixels.
    """
    if image.shape[:2] == size and box in (None, (0, 0, size[1], size[0])):
        return image
    together = image.dtype == np.uint8 and image.shape[2] == 3
    parts = [image] if together else [image[..., channel] for channel in range(image.shape[2])]
    pictures = [Image.fromarray(np.ascontiguousarray(part)).resize((size[1], size[0]), by, box=box) for part in parts]
    return np.asarray(pictures[0]) if together else np.stack([np.asarray(picture) for picture in pictures], axis=2)


def _largest(tall: np.ndarray, wide: np.ndarray, least: float, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Height and width (B, 1) of the largest box whose aspect lies between least and most."""
    height = np.where(wide < least * tall, np.rint(wide / least).astype(np.int64), tall)
    width = np.where(wide > most * tall, np.rint(tall * most).astype(np.int64), wide)
    return np.clip(height, 1, tall), np.clip(width, 1, wide)


def _exp(x: np.ndarray) -> np.ndarray:
    """exp for |x| < 0.3 by its series, to 1e-10: libraries' exp differ in the last bit, which could move a rounded side by a pixel."""
    total = np.ones_like(x)
    for n in range(8, 0, -1):
        total = 1 + x * total / n
    return total
