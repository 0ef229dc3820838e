"""Mean and standard deviation of every channel over all pixels of a source: one pass, float64, whatever the number of processes.

Means and sums of squares of parts are joined by Chan, Golub & LeVeque (1979), so that nothing large is subtracted from anything large.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import numpy as np

from mae.data.decode import DamagedImage
from mae.data.sources import Source
from mae.data.worker import context, serve

TOGETHER = 64  # images that a process reads at a time


class Moments(NamedTuple):
    """What is known of some pixels."""

    pixels: int
    mean: np.ndarray  # (C,) float64
    squares: np.ndarray  # (C,) float64: the sum of (x - mean)^2
    images: int = 1
    damaged: tuple[str, ...] = ()  # names of images that could not be read

    @property
    def std(self) -> np.ndarray:
        """(C,) float64, of the population."""
        return np.sqrt(self.squares / self.pixels)


def of_image(pixels: np.ndarray) -> Moments:
    """Of (H, W, C): uint8 scaled to [0, 1], floats as they are."""
    flat = pixels.reshape(-1, pixels.shape[2])
    means, squares = np.empty(flat.shape[1]), np.empty(flat.shape[1])
    for channel in range(flat.shape[1]):  # one by one: a large image in float64 takes eight times its bytes
        x: np.ndarray = flat[:, channel].astype(np.float64)
        if pixels.dtype == np.uint8:
            x /= 255
        means[channel] = x.mean()
        squares[channel] = np.square(x - means[channel]).sum()
    return Moments(len(flat), means, squares)


def join(parts: Iterable[Moments]) -> Moments:
    """Of all pixels together. There has to be at least one part."""
    iterator = iter(parts)
    total = next(iterator)
    for part in iterator:
        pixels, gap = total.pixels + part.pixels, part.mean - total.mean
        if part.pixels == 0 or total.pixels == 0:
            mean, squares = (part if part.pixels else total)[1:3]
        else:
            mean = total.mean + gap * (part.pixels / pixels)
            squares = total.squares + part.squares + gap**2 * (total.pixels * part.pixels / pixels)
        total = Moments(pixels, mean, squares, total.images + part.images, total.damaged + part.damaged)
    return total


def pixel_moments(source: Source, channels: int, workers: int = 0) -> Iterator[Moments]:
    """Of every TOGETHER images of the source in their order, read by so many processes (0 = this one)."""
    parts = [range(start, min(start + TOGETHER, len(source))) for start in range(0, len(source), TOGETHER)]
    if not workers:
        yield from (_of_part(source, channels, ids) for ids in parts)
        return
    with ProcessPoolExecutor(workers, context("mae.data.statistics"), initializer=_set, initargs=(source, channels)) as pool:
        yield from pool.map(_of_part_here, parts)


def _of_part(source: Source, channels: int, ids: range) -> Moments:
    found, damaged = [Moments(0, np.zeros(channels), np.zeros(channels), images=0)], []
    for index in ids:
        try:
            found.append(of_image(source.read(index)))
        except DamagedImage as error:
            damaged.append(error.name)
    return join(found)._replace(damaged=tuple(damaged))


_here: list[tuple[Source, int]] = []  # of a process that reads


def _set(source: Source, channels: int) -> None:
    serve(0)
    _here[:] = [(source, channels)]


def _of_part_here(ids: range) -> Moments:
    return _of_part(*_here[0], ids)
