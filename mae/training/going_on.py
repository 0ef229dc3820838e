"""Where a run goes on: at its newest checkpoint when it is started again, at an older one after a loss spike."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from mae.errors import LossSpike
from mae.training import checkpoint, distributed, optim, parallel, state, watch
from mae.training.alarms import Alarms
from mae.training.progress import Progress
from mae.training.saving import Saver

log = logging.getLogger("mae")


def resume(
    saver: Saver,
    spread: parallel.Spread,
    rehearse: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    average: optim.Average | None,
    scaler: torch.amp.GradScaler,
    until: int | None = None,
) -> Progress:
    """Goes back to the newest checkpoint (of at most step `until`) that is good on every rank, if there is one."""
    folder, ranks, path = saver.folder, saver.ranks, saver.find(until)
    progress = Progress()
    if path is not None:
        spread.settle(rehearse)
        stored, scalars = checkpoint.load(path)
        state.restore(stored, scalars, spread.module, optimizer, average)
        scaler.load_state_dict(scalars["scaler"])
        progress = Progress(**scalars["progress"])
        log.info("resuming from %s", path)
    if not ranks.first:
        progress.replaced = 0  # the count is the sum over ranks: one of them goes on with it
    distributed.first_does(lambda: folder.rewind(progress.step), ranks)
    return progress


def go_back(spike: LossSpike, progress: Progress, saver: Saver, resume: Callable[[int], Progress], alarms: Alarms | None) -> Progress:
    """Before a loss spike, with the data since then left out. Raises LossSpike where that is no way out any more.

    Chowdhery et al., PaLM, arXiv:2204.02311, section 5.1: spikes come from a state meeting certain batches; from an earlier checkpoint, and
    without the batches around the spike, they did not come again.
    """
    saver.wait()
    if saver.find(spike.calm_until) is None:
        raise LossSpike(f"{spike}, and no checkpoint from before it is left: raise run.keep", calm_until=spike.calm_until)
    earlier = resume(spike.calm_until)
    times = progress.roll_backs + 1 if progress.back_to == earlier.step else 1
    if times > watch.MOST_ROLL_BACKS:
        raise watch.beyond_help(spike)
    saver.forget_after(earlier.step)
    left_out = progress.batch - earlier.batch
    earlier.passed_over += left_out
    earlier.back_to, earlier.roll_backs = earlier.step, times
    earlier.seconds, earlier.replaced = progress.seconds, progress.replaced
    if alarms is not None:
        sentence = f"{spike}: training goes on from step {earlier.step} without the {left_out} batches that followed it"
        alarms.tell("loss spike", sentence, earlier.step)
    return earlier
