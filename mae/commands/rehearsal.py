"""A run rehearsed: a few seconds of its steps and its evaluation on a part of its images, in a folder that is thrown away afterwards.

Nothing is imitated: the rehearsal is the program itself, on the real images through the real loader, cut short. What it took is then
scaled to the run: steps by their number, evaluation by the images, checkpoints by their bytes.
"""

import contextlib
import hashlib
import io
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mae.commands.pretraining import pretrain
from mae.config import Config
from mae.data.sources import Source, Splits, Subset
from mae.errors import Preempted
from mae.evaluation.online import SHARE as LOOKING
from mae.training.distributed import device_of
from mae.training.run import RunFolder
from mae.training.schedule import Plan
from mae.training.watch import memory_gib

SECONDS = 6.0  # of training steps
ROWS = 12  # logged rows, at most and roughly: they cost time too
SHORTEST = 5  # steps that shall fit into them
USUAL = 0.3  # share of a device's matrix products that a step usually reaches: only to choose how much is rehearsed
MOST, FEWEST = 2048, 64  # images evaluated
PROBE = 64 * 2**20  # bytes written to learn how fast the disk is


@dataclass(frozen=True)
class Rehearsal:
    """What was measured."""

    images: int  # a step
    step: float  # seconds, mean once warm
    waiting: float  # share of them spent waiting for data
    memory: float  # bytes at the peak of training
    afterwards: float  # bytes at the peak of what follows: the protocols on `share` of the images, the pictures
    evaluators: float  # seconds of the protocols, on `share` of the images
    share: float
    rest: float  # seconds of all but steps and protocols: building, pictures, the page
    checkpoint: float  # bytes
    skipped: list[str]  # protocols that so few images do not allow


@dataclass(frozen=True)
class Prediction:
    """What the whole run takes, in seconds and bytes, on ranks like this one."""

    steps: int
    step: float
    training: float
    saving: float
    evaluation: float
    rest: float
    memory: float

    @property
    def total(self) -> float:
        """From the command to its end."""
        return self.training + self.saving + self.evaluation + self.rest


def affordable(images: int, cost: float, rate: float) -> int:
    """How many of a step's images fit into a rehearsal, at `cost` FLOPs each on a device of `rate` FLOPs a second."""
    fits = max(1, min(images, int(SECONDS / SHORTEST * USUAL * rate / max(cost, 1))))
    return fits if fits in (images, 1, 2, 3) else fits - fits % 4  # it, and half of it, can be halved as the run's own batches can


def rehearse(
    config: Config,
    splits: Splits,
    plan: Plan,
    *,
    images: int,
    cost: float,
    rate: float,
    beside: Path,
    evaluate: bool = True,
    logged: int | None = None,
) -> Rehearsal:
    """A few seconds of steps of so many images, then (with `evaluate`) the evaluation; its folder is made and removed in `beside`.

    `cost` as in `affordable`; 0 for a method that takes no steps. `logged`: steps between rows of metrics; None = a guess.
    """
    looked = len(splits.train) + (len(splits.test) if splits.test else 0)
    # a forward pass over all patches costs about as much as a masked training step
    share = min(1.0, max(min(MOST, SECONDS * USUAL * rate / max(cost, 1)), FEWEST) / looked)
    if logged is None:
        logged = int(SECONDS / ROWS * USUAL * rate / (images * cost)) if cost else 1
    train = replace(config.train, batch_size=images, accumulate=1, log_every=max(1, min(config.train.log_every, logged)))
    train = replace(train, steps=None, epochs=None, minutes=SECONDS / 60, checkpoint_every=1 << 40, evaluate_every=0)
    trial = replace(config, train=train, track=replace(config.track, wandb="off", images_every=0))
    trial = trial if evaluate else replace(trial, evaluate=replace(config.evaluate, protocols=[]))
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=beside) as place, _quiet() as said:
        folder = RunFolder(Path(place) / "runs" / "rehearsal")  # one deeper: features and controls are kept beside a run
        trial = replace(trial, run=replace(config.run, dir=str(folder.path)))
        began = time.perf_counter()
        try:
            pretrain(trial, folder, _some(splits, share), replace(plan, steps=None, seconds=SECONDS, batch_size=images))
        except Preempted as error:  # whose words are those of a run
            raise Preempted("stopped while rehearsing; nothing is left behind: run the same command again") from error
        took = time.perf_counter() - began
        rows = [row for row in folder.rows() if "images_per_second" in row]
        entries: list[dict[str, Any]] = json.loads(folder.results.read_text()) if folder.results.is_file() else []
        checkpoint = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
        memory = (folder.derived() or {})["peak_memory_gib"] * 2**30
    if cost and not rows:  # steps are far slower than guessed
        return rehearse(config, splits, plan, images=images, cost=cost, rate=rate, beside=beside, evaluate=evaluate, logged=1)
    warm = rows[len(rows) // 4 :]
    evaluators = sum(entry["seconds"] for entry in entries)
    return Rehearsal(
        images=images,
        step=float(np.mean([images / row["images_per_second"] for row in warm])) if warm else 0.0,
        waiting=float(np.mean([row["data_wait"] for row in warm])) if warm else 0.0,
        memory=memory,
        afterwards=memory_gib(device_of(config.train.device)) * 2**30,
        evaluators=evaluators,
        share=share,
        rest=max(took - evaluators - (SECONDS if cost else 0), 0.0),
        checkpoint=float(checkpoint),
        skipped=[line for line in said.getvalue().splitlines() if " is skipped: " in line],
    )


def predict(
    config: Config, plan: Plan, measured: Rehearsal, half: Rehearsal | None, *, images: int, parts: int, start: float
) -> Prediction:
    """The run of `parts` micro-batches of `images` a step, from a rehearsal with as many; or with fewer, and one with half of those.

    `start`: seconds from the command to where the rehearsal began.
    """
    step, memory = measured.step, measured.memory
    if half is not None:
        an_image = max(measured.step - half.step, 0.0) / (measured.images - half.images)
        step += an_image * (images - measured.images)
        memory += max(measured.memory - half.memory, 0.0) / (measured.images - half.images) * (images - measured.images)
    step *= parts
    learns = measured.step > 0
    steps = 0 if not learns else plan.steps if plan.steps is not None else max(int((plan.seconds or 0) / step), 1)
    training = (steps * step if plan.seconds is None else plan.seconds) if learns else 0.0
    if config.train.evaluate_every:
        training *= 1 + LOOKING
    saves = math.ceil(steps / config.train.checkpoint_every)
    return Prediction(
        steps=steps,
        step=step,
        training=training,
        saving=saves * disk_seconds(measured.checkpoint),
        evaluation=measured.evaluators / measured.share,
        rest=start + measured.rest,
        memory=memory,
    )


def disk_seconds(size: float) -> float:
    """Seconds to write, sync and hash a file of so many bytes where temporary files go, from one of at most PROBE bytes."""
    probe = os.urandom(int(min(max(size, 1), PROBE)))
    began = time.perf_counter()
    with tempfile.TemporaryFile() as file:
        file.write(probe)
        file.flush()
        os.fsync(file.fileno())
    hashlib.sha256(probe)
    return (time.perf_counter() - began) * max(size / len(probe), 1)


def _some(splits: Splits, share: float) -> Splits:
    def part(source: Source) -> Source:
        count = min(len(source), max(round(share * len(source)), FEWEST))
        return Subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))

    if share == 1:
        return splits
    return Splits(part(splits.train), part(splits.validation), None if splits.test is None else part(splits.test))


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    """Keeps what a run says to its user; yields what it prints."""
    log, said = logging.getLogger("mae"), io.StringIO()
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            yield said
    finally:
        log.setLevel(level)
