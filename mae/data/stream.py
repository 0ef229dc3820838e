"""Tar shards read from front to back as they come, without an index (webdataset): for shards that no disk here can hold.

NOT EXACT, and the only way of reading that is not: within an epoch images may repeat or be missed (where shards are of unequal
length, where data.workers or the ranks do not divide them, where one is cut short, which a stream cannot tell from its end),
an epoch is data.length images by definition, and a restart begins a new stream. What needs an image by its number is refused.
"""

import logging
import random
from collections.abc import Iterator, Sequence
from http.client import HTTPResponse
from itertools import islice
from typing import Any

import numpy as np

from mae.data.decode import DamagedImage, decode
from mae.data.download import answer
from mae.data.index import IMAGES
from mae.data.remote import urls_of
from mae.data.sources import Opened, fingerprint, is_url, path_of
from mae.errors import ConfigError
from mae.keys import Data, public

KEPT = 1024  # images of a shard that are kept for validation, or for figures of the training images
BUFFER = 1000  # images of a process that are mixed, as the files they are


class Kept:
    """The first images of a shard, in memory as the files they are."""

    classes, labels = None, None

    def __init__(self, shard: str, channels: int) -> None:
        """Raises ConfigError where the shard holds no image or cannot be read."""
        self.files = list(islice(_images([shard], strict=True), KEPT))
        self.channels = channels
        if not self.files:
            raise ConfigError(f"{public(shard)} holds no images: members named KEY.{', KEY.'.join(IMAGES)} are looked for")
        self.fingerprint = fingerprint("\n".join(name for name, _ in self.files), np.array([len(content) for _, content in self.files]))

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, C) uint8. Raises DamagedImage."""
        name, content = self.files[index]
        return decode(content, channels=self.channels, name=name)

    def name_of(self, index: int) -> str:
        return self.files[index][0]


class Stream:
    """The training images of a stream: `draw` gives the next ones. For one process each, which begins its own when it first draws."""

    classes, labels = None, None

    def __init__(self, shards: Sequence[str], data: Data) -> None:
        """`shards`: folders' files or URLs; data.length says what is taken for an epoch."""
        self.shards, self.data, self.length = list(shards), data, data.length or 0
        self.head = Kept(self.shards[0], data.channels)
        self.fingerprint = fingerprint("\n".join(public(shard) or "" for shard in self.shards))
        self._files: Iterator[tuple[str, bytes]] | None = None

    def __len__(self) -> int:
        return self.length

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": None}

    def read(self, index: int) -> np.ndarray:
        """One of the first shard's images: enough for figures of training images, and no order."""
        return self.head.read(index % len(self.head))

    def name_of(self, index: int) -> str:
        return self.head.name_of(index % len(self.head))

    def draw(self, count: int, *, seed: int, part: int, parts: int) -> tuple[list[np.ndarray], list[DamagedImage]]:
        """The next `count` images (H, W, C) uint8 of this process, which reads every `parts`-th shard from `part` on, again and again.

        Damaged images are passed over and told. Raises ConfigError where there is no whole image in all its shards.
        """
        if self._files is None:
            self._files = _endless(self.shards[part::parts], random.Random(f"{seed}/{part}"))
        images: list[np.ndarray] = []
        damage: list[DamagedImage] = []
        while len(images) < count:
            name, content = next(self._files)
            try:
                images.append(decode(content, channels=self.data.channels, name=name))
            except DamagedImage as error:
                damage.append(error)
                if len(damage) > KEPT:
                    raise ConfigError(f"{error}, as more than {KEPT} images before it: repair the shards") from error
        return images, damage


def open_stream_of_shards(data: Data) -> Opened:
    """The shards of the folder or URLs `data.path`: the last one for validation, the others for training.

    Raises ConfigError where there is only one, or data.length is missing.
    """
    if data.length is None:
        raise ConfigError("data.length is missing: a stream does not know its length, say how many images an epoch is with data.length=N")
    if data.cache != "none":
        raise ConfigError(f"data.cache={data.cache} needs images by their number, which a stream has not: set data.cache=none")
    shards = urls_of(data.path) if data.path and is_url(data.path) else [str(file) for file in sorted(path_of(data).rglob("*.tar"))]
    if len(shards) < 2:
        raise ConfigError(f"data.path {public(data.path)} means {len(shards)} shard: at least two are needed, one is held out")
    logging.getLogger("mae").warning(
        "data.name=stream is not exact: images may repeat or be missed, a restart begins a new stream; data.name=shards does better"
    )
    return Opened(train=Stream(shards[:-1], data), validation=Kept(shards[-1], data.channels))


def _endless(shards: list[str], order: random.Random) -> Iterator[tuple[str, bytes]]:
    from webdataset import filters

    mix = filters.shuffle(BUFFER, rng=order)
    while True:
        order.shuffle(shards)
        found = False
        for entry in mix(_images(shards)):
            found = True
            yield entry
        if not found:
            raise ConfigError(f"none of {len(shards)} shards gives an image, {public(shards[0])} among them: check data.path")


def _images(shards: Sequence[str], *, strict: bool = False) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the image files in the shards, one after the other. A shard that fails is told and left; `strict`: ConfigError."""
    from webdataset.tariterators import tar_file_iterator

    for shard in shards:
        shown = public(shard)
        try:
            with _Whole(answer(shard)) if is_url(shard) else open(shard, "rb") as stream:
                for member in tar_file_iterator(stream, select_files=_is_image):
                    yield f"{shown}/{member['fname']}", member["data"]
        except GeneratorExit:
            raise
        except Exception as error:  # tarfile and http raise a dozen kinds
            if strict:
                raise ConfigError(f"{shown} cannot be read: {error}") from error
            logging.getLogger("mae").error("%s: %s; the stream goes on with the next shard", shown, error)


def _is_image(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2].lower() in IMAGES


class _Whole:
    """The body of a server's answer, which must be as long as the server said: a closed connection looks like an end."""

    def __init__(self, body: HTTPResponse) -> None:
        self.body, self.left = body, int(body.headers.get("Content-Length") or -1)

    def read(self, count: int) -> bytes:
        content = self.body.read(count)
        self.left -= len(content)
        if not content and self.left > 0:
            raise OSError(f"the connection ended {self.left:,} bytes too early")
        return content

    def __enter__(self) -> "_Whole":
        return self

    def __exit__(self, *_: object) -> None:
        self.body.close()
