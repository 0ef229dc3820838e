"""Which image every reading process is at: a process that is stuck in a read cannot say so itself."""

import shutil
import time
from multiprocessing.sharedctypes import RawArray

from torch.utils.data import get_worker_info


class Reading:
    """A board in memory that the processes write to and the main one reads. It crosses to processes while they are started."""

    def __init__(self, processes: int) -> None:
        """`processes` read beside the main one; without any, that one reads."""
        self.workers = processes
        self.ids = RawArray("q", [-1] * max(processes, 1))
        self.since = RawArray("d", max(processes, 1))

    def note(self, index: int) -> None:
        """This process begins to read image `index`; -1: it reads none."""
        worker = get_worker_info()
        if worker is None and self.workers:  # the main process reads some again that a GPU could not unpack: no worker's doing
            return
        slot = 0 if worker is None else worker.id
        self.since[slot] = time.monotonic()
        self.ids[slot] = index

    def longest(self) -> tuple[int, int, float] | None:
        """(process, image, seconds) of the read that takes longest, None where nothing is being read."""
        now = time.monotonic()
        busy = [(slot, index, now - self.since[slot]) for slot, index in enumerate(self.ids) if index >= 0]
        return max(busy, key=lambda entry: entry[2], default=None)

    def idle(self) -> float:
        """Seconds since the last process finished a read and all have done something but do nothing now; else 0."""
        resting = all(index < 0 for index in self.ids) and all(self.since)
        return time.monotonic() - max(self.since) if resting else 0.0


def shared_memory() -> str:
    """What to do about /dev/shm, through which batches come from the processes."""
    try:
        free = f"has {shutil.disk_usage('/dev/shm').free / 2**20:.0f} MiB free"
    except OSError:
        free = "is not there"
    return f"/dev/shm, through which batches come, {free}: enlarge it (docker: --shm-size), or lower data.workers or train.batch_size"
