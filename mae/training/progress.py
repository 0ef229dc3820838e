"""Where a run stands: all of it is in a checkpoint."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Counts of what was done, the same on every rank but for `replaced` and `seconds`."""

    step: int = 0  # optimiser steps taken, those with a skipped update included
    seconds: float = 0.0  # spent training, without evaluation
    replaced: int = 0  # damaged images that this rank replaced
    skipped: int = 0  # updates that were not made, because a loss or a gradient was not finite
    skipped_in_a_row: int = 0  # of these, the last ones without one that was made between them
    back_to: int = 0  # step of the checkpoint to which a loss spike sent the run back last
    roll_backs: int = 0  # times that it did, to that one
    passed_over: int = 0  # global batches that a roll-back left out: step s takes batch s + passed_over
    losses: list[float] = field(default_factory=list)  # the latest that were logged, to know a spike by

    @property
    def batch(self) -> int:
        """The number of the global batch that comes next."""
        return self.step + self.passed_over
