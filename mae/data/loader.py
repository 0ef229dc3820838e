"""Steps -> batches on the device. Order, crops and keys of a batch do not depend on who makes it, or when.

The data set that the worker processes read is indexed by STEP: item t is this rank's part of global batch t, so workers,
prefetching and restarts cannot change what is in it (torchdata's stateful loaders exist to repair what this never breaks).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from mae.config import Config
from mae.data import crops, order, region, substitute
from mae.data.batch import Batch, Samples, finished, micro_batches, normalise
from mae.data.cached import Cache
from mae.data.packed import Packed, Packing
from mae.data.plain import Regions, numbers_of
from mae.data.processes import read_ahead
from mae.data.reading import Reading
from mae.data.resample import crop_one
from mae.data.sources import Source
from mae.data.stream import KEPT, Stream
from mae.errors import ConfigError
from mae.nets.keyed import hash_integers

__all__ = ["Batch", "evaluation_batches", "normalise", "train_batches"]

FOREVER = 1 << 62
TOGETHER = 8  # images held at their own sizes: crops are drawn for all of them at once, and they are still in the cache when cut

Transform = Callable[[np.ndarray, int], Tensor]
Views = Callable[[list[np.ndarray], np.ndarray], list[Tensor]]


class TrainSteps(Dataset[Samples | Packed | ConfigError]):
    """Item t: this rank's samples of global batch t, read one by one; or the ConfigError that says why there are none."""

    def __init__(self, source: Source, config: Config, rank: int, world: int, transform: Transform | None) -> None:
        self.source, self.config, self.rank, self.world, self.transform = source, config, rank, world, transform
        self.reading = Reading(config.data.workers)
        own_way = config.data.cache == "none" and transform is None and not isinstance(source, Stream) and config.data.name != "arrays"
        parts = source, config.data, config.image_size, self.reading, self.read
        self.packing = Packing(*parts) if own_way and config.data.decode == "gpu" else None
        self.regions = Regions(*parts) if own_way and config.data.channels == 3 and region.available() else None

    def share(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, keys) of the rank's samples."""
        train = self.config.train
        shuffle, length = self.config.data.shuffle, len(self.source)
        return order.rank_share(
            step, batch_size=train.batch_size, length=length, seed=train.seed, rank=self.rank, world=self.world, shuffle=shuffle
        )

    def __getitem__(self, step: int) -> Samples | Packed | ConfigError:
        if isinstance(self.source, Stream):
            return self._drawn(self.source, step)
        if self.packing is not None:
            return self.packing.pack(*self.share(step))
        if self.regions is not None:
            return self.regions.read(*self.share(step))
        return self.read(*self.share(step))

    def _drawn(self, stream: Stream, step: int) -> Samples | ConfigError:
        """The next images of this process's own stream; the keys, which decide crops and masks, are those of the step."""
        count, worker = self.config.train.batch_size // self.world, get_worker_info()
        number, each = (0, 1) if worker is None else (worker.id, worker.num_workers)
        part, parts = self.rank * each + number, self.world * each
        keys = hash_integers(self.config.train.seed, step, np.arange(self.rank * count, (self.rank + 1) * count))
        try:
            images, damage = stream.draw(count, seed=int(hash_integers(self.config.train.seed, step)), part=part, parts=parts)
        except ConfigError as error:
            return error
        views = self._views(images, keys)
        nobody = np.full(count, -1)
        return Samples(torch.stack(views), torch.from_numpy(np.stack([keys, nobody, nobody])), np.zeros(count, bool), damage)

    def read(self, ids: np.ndarray, keys: np.ndarray) -> Samples | ConfigError:
        """The images of those ids (B,) int64, cropped and mirrored as their keys (B,) int64 say."""
        return _read_all(self.source, ids, keys, self._views, self.reading)

    def _views(self, images: list[np.ndarray], keys: np.ndarray) -> list[Tensor]:
        if self.transform is not None:
            return [self.transform(image, key) for image, key in zip(images, keys.tolist(), strict=True)]
        data, size = self.config.data, self.config.image_size
        scale = (data.crop_scale[0], data.crop_scale[1])
        tall, wide = np.array([image.shape[:2] for image in images]).T
        boxes = crops.boxes(keys, tall, wide, scale=scale, aspect=size[1] / size[0])
        flips = crops.flips(keys) if data.flip else np.zeros(len(keys), bool)
        return [finished(crop_one(image, box, bool(flip), size), data) for image, box, flip in zip(images, boxes, flips, strict=True)]


class EvaluationBatches(Dataset[Samples | ConfigError]):
    """Item i: images [i * batch_size, (i + 1) * batch_size), resized and centre-cropped."""

    def __init__(self, source: Source, config: Config, batch_size: int) -> None:
        self.source, self.config, self.batch_size = source, config, batch_size
        self.reading = Reading(config.data.workers)

    def __getitem__(self, number: int) -> Samples | ConfigError:
        ids = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.source)))
        keys = hash_integers(self.config.train.seed, -1, ids)  # an epoch that training never has
        return _read_all(self.source, ids, keys, self._views, self.reading)

    def _views(self, images: list[np.ndarray], keys: np.ndarray) -> list[Tensor]:
        size, data = self.config.image_size, self.config.data
        return [finished(torch.from_numpy(crops.central(image, size, data.resize).transpose(2, 0, 1).copy()), data) for image in images]


def train_batches(
    source: Source,
    config: Config,
    *,
    first_step: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    transform: Transform | None = None,
) -> Generator[list[Batch], None, None]:
    """Endless: item i is the rank's `accumulate` micro-batches of global batch first_step + i, on the device.

    Images are randomly cropped and mirrored as data.crop_scale and data.flip say, (b, C, H, W) uint8, or float32 where the source is; or
    whatever `transform(image (H, W, C), key)` makes of them (with data.workers it must be picklable); images are then read one by
    one even where data.cache is set.
    A damaged image is replaced by another one (with that one's label), logged once by name and counted; ids and keys stay.
    Raises ConfigError for a batch that cannot be divided, data that do not fit data.cache, and too much damage.
    """
    if config.train.batch_size % (world * accumulate):
        raise ConfigError(f"train.batch_size {config.train.batch_size} is not a multiple of ranks x accumulate = {world} x {accumulate}")
    steps = TrainSteps(source, config, rank, world, transform)
    readers = world * max(config.data.workers, 1)
    if isinstance(source, Stream) and len(source.shards) < readers:
        raise ConfigError(f"{len(source.shards)} shards cannot be shared by {readers} reading processes: lower data.workers or the ranks")
    if config.data.cache == "none" or transform is not None:
        samples = _stream(steps, range(first_step, FOREVER), config, device)
    else:
        cache = Cache(source, config, device)
        samples = (cache.samples(*steps.share(step)) for step in range(first_step, FOREVER))
    batches = _on_device(samples, accumulate, device)
    return _ahead(batches, device) if device.type == "cuda" else batches


def evaluation_batches(
    source: Source, config: Config, *, batch_size: int, device: torch.device, rank: int = 0, world: int = 1
) -> Generator[Batch, None, None]:
    """Every image once and in order, scaled to data.resize x image_size and centre-cropped; the last batch may be smaller.

    A rank gets every world-th batch. Damaged images are replaced as in training, labels too.
    """
    if isinstance(source, Stream) and len(source) > KEPT:
        raise ConfigError("data.name=stream gives no image by its number, and this needs all of them: choose data.name=shards")
    items = EvaluationBatches(source, config, batch_size)
    numbers = range(rank, -(-len(source) // batch_size), world)
    return (batches[0] for batches in _on_device(_stream(items, numbers, config, device), 1, device))


def _read_all(source: Source, ids: np.ndarray, keys: np.ndarray, views: Views, reading: Reading) -> Samples | ConfigError:
    """Reads images one by one and stacks what `views(images, keys)` makes of some of them."""
    read: list[np.ndarray] = []
    images: list[Tensor] = []
    shown, damage = ids.copy(), []
    for i, (index, key) in enumerate(zip(ids.tolist(), keys.tolist(), strict=True)):
        reading.note(index)
        try:
            image, shown[i], met = substitute.read(source, index, key)
        except ConfigError as error:
            return error  # raised in the main process: an exception that crosses processes brings its traceback into the message
        damage += met
        read.append(image)
        if len(read) == TOGETHER or i + 1 == len(ids):
            images += views(read, keys[len(images) : i + 1])
            read.clear()
    samples = Samples(torch.stack(images), numbers_of(source, ids, keys, shown), shown != ids, damage)
    reading.note(-1)
    return samples


def _on_device(samples: Iterable[Samples], accumulate: int, device: torch.device) -> Generator[list[Batch], None, None]:
    log = substitute.DamageLog()
    for item in samples:
        log.add(item.damage)
        yield micro_batches(item, accumulate, device)


def _ahead(steps: Iterator[list[Batch]], device: torch.device) -> Generator[list[Batch], None, None]:
    """The same, each copied to the GPU on a stream of its own while the step before is still computed."""
    side, ready = torch.cuda.Stream(device), None
    while True:
        with torch.cuda.stream(side):
            following = next(steps, None)
            copied = side.record_event()
        if ready is not None:
            here = torch.cuda.current_stream(device)
            here.wait_event(ready[1])
            for batch in ready[0]:
                for tensor in (batch.images, batch.keys, batch.labels, batch.ids):
                    tensor.record_stream(here)  # its memory is the side stream's, which must not use it again too early
            yield ready[0]
        if following is None:
            return
        ready = following, copied


def _stream(items: TrainSteps | EvaluationBatches, indices: Iterable[int], config: Config, device: torch.device) -> Iterator[Samples]:
    """Reads the items in order, in data.workers processes or in this one."""
    if config.data.workers:
        stream = read_ahead(items, indices, items.reading, items.source.name_of, pin_memory=device.type == "cuda")
    else:
        stream = (items[index] for index in indices)
    with closing(stream):  # now, not when the traceback is forgotten
        for item in stream:
            if isinstance(item, ConfigError):
                raise item
            if isinstance(item, Packed):
                assert isinstance(items, TrainSteps)
                assert items.packing is not None
                item = items.packing.unpack(item, device)
            yield item
