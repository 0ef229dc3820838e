"""Items of a data set, read ahead in order by other processes; one that is dead or stuck is told and not waited for."""

import atexit
import logging
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from mae.data.reading import Reading, shared_memory
from mae.data.worker import context, forget, held_back, named_semaphores, serve, start_tracker

PATIENCE_SECONDS = 20  # between looks at whether the processes still live
STALLED_SECONDS = 300

Item = TypeVar("Item")
Name = Callable[[int], str]  # of an image, by its number


def read_ahead(
    items: Dataset[Item], indices: Iterable[int], reading: Reading, name_of: Name, *, pin_memory: bool
) -> Generator[Item, None, None]:
    """The items of those indices, read by `reading.workers` processes, which note there what they are at.

    Raises RuntimeError where one of them died, or where a batch does not come for STALLED_SECONDS.
    """
    loader = DataLoader(
        items,
        batch_size=None,
        sampler=indices,
        num_workers=reading.workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        timeout=PATIENCE_SECONDS,
        multiprocessing_context=context("mae.data.server"),
        worker_init_fn=serve,
        generator=torch.Generator(),  # the global one belongs to the model
    )
    start_tracker()
    with held_back(), named_semaphores() as names:
        iterator = iter(loader)  # starts the workers, and the first time their fork server
    _open_iterators.add(iterator)
    try:
        for count, _ in enumerate(indices, 1):
            item = _next(iterator, reading, name_of)
            if count == reading.workers:  # all of them have answered: nobody needs the names any more
                forget(names)
            yield item
    finally:
        _close(iterator)


def _close(iterator: Any) -> None:
    """Ends the workers, which deaf as they are to signals would otherwise keep the interpreter from exiting."""
    iterator._shutdown_workers()
    for worker in iterator._workers:
        if worker.is_alive():  # stuck in a read
            worker.kill()


_open_iterators: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register  # before multiprocessing's own, which waits for ever
def _close_all() -> None:
    for iterator in list(_open_iterators):
        _close(iterator)


def _next(iterator: Iterator[Any], reading: Reading, name_of: Name) -> Any:
    """The next item; tells a dead worker from a slow one, both after a while, and names what it reads and what to do."""
    start = time.monotonic()
    while True:
        try:
            return next(iterator)
        except RuntimeError as error:
            if "exited unexpectedly" in str(error) or "killed by signal" in str(error):
                raise RuntimeError(f"a process that reads images died ({error}); is memory short? {shared_memory()}") from error
            if "timed out" not in str(error):
                raise
            waited = time.monotonic() - start
            if reading.idle() > PATIENCE_SECONDS / 2:
                raise RuntimeError(f"a batch was lost on its way; {shared_memory()}") from error
            stuck = reading.longest()
            where = "the disk or the network that holds the images"
            if stuck is not None:
                where = f"reading process {stuck[0]} is at {name_of(stuck[1])} for {stuck[2]:.0f} s, {where}"
            logging.getLogger("mae").error("no batch for %.0f s: %s is slow", waited, where)
            if waited > STALLED_SECONDS:
                raise RuntimeError(f"no batch for {waited:.0f} s: {where} does not answer") from error


def _unchanged(item: Any) -> Any:
    return item
