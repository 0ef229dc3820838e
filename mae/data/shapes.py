"""Rendered shapes with known factors, in the manner of dSprites (Matthey et al., 2017) and 3D Shapes: one coloured figure on grey.

Every combination of the factors is one image; `data.length` of them, drawn without replacement, are the data, so that no image is
in two splits. All figures of one size have the same area, and lie wholly inside the frame. Angles stay below 90 degrees: up to there
each can be told on every figure, the square too.
"""

import colorsys
from functools import cached_property

import numpy as np

from mae.data.sources import Factors, Opened, Subset, fingerprint, position_hashes, share_of
from mae.errors import ConfigError
from mae.keys import Data

SHAPES = ("square", "ellipse", "triangle", "heart")
COLOURS = np.array([colorsys.hsv_to_rgb(hue / 8, 0.75, 1.0) for hue in range(8)], np.float32)  # (8, 3)
LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R 601
AREAS = np.linspace(0.18, 0.34, 6, dtype=np.float32)  # side of the square of equal area, in image sides
ANGLES = np.linspace(0, np.pi / 2, 6, endpoint=False, dtype=np.float32)
PLACES = np.linspace(0.31, 0.69, 16, dtype=np.float32)  # of the figure's centre, in image sides
NAMES = ("shape", "colour", "size", "angle", "x", "y")
SIZES = (len(SHAPES), len(COLOURS), len(AREAS), len(ANGLES), len(PLACES), len(PLACES))
ORDERED = (False, False, True, True, True, True)
BACKGROUND = 40  # grey of 255
COMBINATIONS = int(np.prod(SIZES))
LENGTH = 20_000  # images where data.length says nothing
TEST_SHARE = 0.25


class Shapes:
    """`length` combinations of factors, chosen by the seed; image i is a function of its factors, rendered when read."""

    classes = SHAPES
    mask_classes = ("background", *SHAPES)

    def __init__(self, length: int, *, size: tuple[int, int], channels: int, seed: int = 0) -> None:
        """Images (H, W, channels) of `size` pixels. Raises ConfigError for a length that cannot be."""
        if not 8 <= length <= COMBINATIONS:
            raise ConfigError(f"data.length {length} is not possible: shapes have {COMBINATIONS:,} different images, choose 8 or more")
        self.size, self.channels = size, channels
        chosen = np.argsort(position_hashes(COMBINATIONS, seed + 2), kind="stable")[:length]  # + 2: seed and seed + 1 draw the splits
        self.factors = Factors(np.stack(np.unravel_index(chosen, SIZES), axis=1).astype(np.int64), NAMES, SIZES, ORDERED)
        self.labels = self.factors.values[:, 0]

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint("shapes 1", self.factors.values, np.array([*self.size, self.channels]))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, C) uint8."""
        paint = COLOURS[self.factors.values[index, 1]]
        contrast = 255 * (paint if self.channels == 3 else paint @ LUMA) - BACKGROUND
        return (self._coverage(index)[..., None] * contrast + (BACKGROUND + 0.5)).astype(np.uint8)

    def mask(self, index: int) -> np.ndarray:
        """(H, W) uint8, at every pixel the index in `mask_classes` of what covers most of it."""
        return (self._coverage(index) > 0.5).astype(np.uint8) * np.uint8(self.labels[index] + 1)

    def name_of(self, index: int) -> str:
        return ", ".join(f"{name} {value}" for name, value in zip(NAMES, self.factors.values[index], strict=True))

    def _coverage(self, index: int) -> np.ndarray:
        """(H, W) float, the share of every pixel that the figure covers, from the distance of its centre to the outline."""
        shape, _, size, angle, x, y = self.factors.values[index]
        height, width = self.size
        side = min(height, width)  # figures keep their form in an oblong frame
        along = (np.arange(width, dtype=np.float32) + (0.5 - PLACES[x] * width)) / side
        down = ((np.arange(height, dtype=np.float32) + (0.5 - PLACES[y] * height)) / side)[:, None]
        cos, sin = np.cos(ANGLES[angle]), np.sin(ANGLES[angle])
        u, v = (cos * along + sin * down) / AREAS[size], (cos * down - sin * along) / AREAS[size]
        return (0.5 - distance(SHAPES[shape], u, v) * (AREAS[size] * side)).clip(0, 1)


def distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far points (x, y), y down, lie outside (+) or inside (-) a figure of area 1 about the origin; exact near the outline."""
    if shape == "square":
        return _square(x, y, 1.0)
    if shape == "ellipse":
        a, b = (2 / np.pi) ** 0.5, (2 * np.pi) ** -0.5  # half axes 2 : 1
        reach = np.sqrt((x / a) ** 2 + (y / b) ** 2) + 1e-12
        return (reach - 1) * reach / (np.sqrt((x / a**2) ** 2 + (y / b**2) ** 2) + 1e-12)  # to first order: value over gradient
    if shape == "triangle":
        inner = 27**-0.25  # the inscribed circle's radius
        return np.maximum(y, np.abs(x) * 0.75**0.5 - y * 0.5) - inner
    side = (1 + np.pi / 4) ** -0.5  # the heart: a square on its corner and two half discs on its upper sides
    lift = (np.pi / 16 + 1 / 12) * side / (1 + np.pi / 4)  # of the centre of mass, along either side of the square
    x, y = (x - y) * 0.5**0.5 - lift, (x + y) * 0.5**0.5 - lift
    discs = [np.hypot(x - dx * side / 2, y - dy * side / 2) - side / 2 for dx, dy in ((0, -1), (-1, 0))]
    return np.minimum(_square(x, y, side), np.minimum(*discs))


def open_shapes(data: Data) -> Opened:
    """`data.length` images of data.image_size; a quarter of them, fixed by `data.split_seed`, are for testing."""
    side = data.image_size
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    shapes = Shapes(LENGTH if data.length is None else data.length, size=size, channels=data.channels, seed=data.split_seed)
    test = share_of(position_hashes(len(shapes), data.split_seed + 1), TEST_SHARE)
    return Opened(train=Subset(shapes, ~test), test=Subset(shapes, test))


def _square(x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - side / 2
