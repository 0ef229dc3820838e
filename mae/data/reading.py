"""Which image every reading process is at: a process that is stuck in a read cannot say so itself."""

import shutil
import time
from multiprocessing.sharedctypes import RawArray

from torch.utils.data import get_worker_info

ROOM = 1 << 22  # bytes of shared memory below which a batch has no place


class Reading:
    """A board in memory that the processes write to and the main one reads. It crosses to processes while they are started."""

    def __init__(self, processes: int) -> None:
        """`processes` read beside the main one; without any, that one reads."""
        self.ids = RawArray("q", [-1] * max(processes, 1))
        self.since = RawArray("d", max(processes, 1))

    def note(self, index: int) -> None:
        """This process begins to read image `index`; -1: it reads none."""
        worker = get_worker_info()
        slot = 0 if worker is None else worker.id
        self.since[slot] = time.monotonic()
        self.ids[slot] = index

    def longest(self) -> tuple[int, int, float] | None:
        """(process, image, seconds) of the read that takes longest, None where nothing is being read."""
        now = time.monotonic()
        busy = [(slot, index, now - self.since[slot]) for slot, index in enumerate(self.ids) if index >= 0]
        return max(busy, key=lambda entry: entry[2], default=None)


def shared_memory_full() -> str | None:
    """A sentence where /dev/shm, through which batches come from the processes, has no room; else None."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
    if free >= ROOM:
        return None
    return f"/dev/shm is full ({free >> 10} KiB free), batches come through it: enlarge it (docker: --shm-size) or lower data.workers"
