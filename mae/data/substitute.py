"""A damaged image never changes a batch's size or order: another sample, chosen by the damaged one's key, takes its place."""

import logging

import numpy as np

from mae.data.decode import DamagedImage
from mae.data.sources import Source
from mae.errors import ConfigError
from mae.nets.keyed import bits_numpy

TRIES = 10


def candidates(key: int, length: int) -> np.ndarray:
    """(TRIES,) int64 ids that may stand in for the sample with this key."""
    return (bits_numpy(np.array([key]), TRIES, "substitute")[0] % np.uint64(length)).astype(np.int64)


def read(source: Source, index: int, key: int) -> tuple[np.ndarray, int, list[DamagedImage]]:
    """(image, id of the image shown, damage met on the way). Raises ConfigError where the substitutes are damaged too."""
    try:
        return source.read(index), index, []
    except DamagedImage as error:
        damage = [error]
    for shown in candidates(key, len(source)).tolist():
        try:
            return source.read(shown), shown, damage
        except DamagedImage as error:
            damage.append(error)
    raise too_much(damage[0])


def too_much(damage: DamagedImage) -> ConfigError:
    """The answer to data of which too little can be read."""
    return ConfigError(f"{damage}, nor can {TRIES} images drawn in its place: repair the data or remove what is damaged")


def within(damaged: float, count: int, budget: float) -> bool:
    """Whether `damaged` of `count` images are no more than a share `budget`; where that is above 0, one is never too much."""
    return damaged <= (max(1, budget * count) if budget else 0)


def check(replaced: int, met: int, length: int, budget: float) -> None:
    """Raises ConfigError where too many images are damaged.

    `replaced`: damaged images among the `met` first of the concatenated epochs, on all ranks; `length`: images of an epoch; `budget`:
    data.damage. As an epoch meets every image once, at least `replaced` / epochs begun different images are damaged, whatever the ranks,
    workers and restarts.
    """
    if not within(replaced / max(1, -(-met // length)), length, budget):
        raise ConfigError(
            f"{replaced:,} times in {met:,} an image could not be read (all are named above), of {length:,} images more than "
            f"data.damage={budget:g}: repair or remove them, or allow more with data.damage=..., with which the same command goes on"
        )


class DamageLog:
    """Names every damaged image once."""

    def __init__(self) -> None:
        self.named: set[str] = set()

    def add(self, damage: list[DamagedImage]) -> None:
        for error in damage:
            if error.name not in self.named:
                self.named.add(error.name)
                logging.getLogger("mae").error("%s; another image takes its place", error)  # every rank meets others
