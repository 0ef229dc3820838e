"""Checkpoints of a run on several ranks: all save at the same step, fail together, and go back to the same checkpoint."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mae.errors import CannotSave, ConfigError, LossSpike, NonFiniteLoss, Preempted, ReplicasDiffer
from mae.keys import Run
from mae.training import checkpoint, distributed, stored
from mae.training.distributed import Ranks
from mae.training.run import RunFolder

log = logging.getLogger("mae")
PATIENCE_SECONDS = 15  # for a network file system to show a rank what another one wrote or read


class Saver:
    """Commits a run's checkpoints from rank 0, in the foreground or behind the training; leaving it waits for the last one."""

    def __init__(self, folder: RunFolder, config: Run, ranks: Ranks, facts: dict[str, Any]) -> None:
        """`facts` go into every manifest; those that a later start must share are `config` and `data`."""
        self.folder, self.config, self.ranks, self.facts = folder, config, ranks, facts
        self.newest: int | None = None  # the step that was saved last in this process
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Preempted | NonFiniteLoss | LossSpike | ReplicasDiffer):  # what all ranks leave by
            self.wait()
        self._thread.shutdown()

    def save(self, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], *, samples: int) -> None:
        """Every rank calls it with the same step; what rank 0 holds is written, once. Raises CannotSave on every rank.

        In the background an error of this save is raised by the next one, or by `wait`.
        """
        self.wait()
        if step == self.newest:
            return
        shares = None if stored.whole(tensors) else self._stage(step, tensors)
        work = partial(self._commit, step, tensors, scalars, self.facts | {"world": self.ranks.world, "samples": samples}, shares)
        if not self.config.background:
            self._together(work)
        elif self.ranks.first:  # a copy: the next steps change the tensors where they are
            copies = {k: v.detach().to("cpu", copy=True) for k, v in tensors.items()} if shares is None else {}
            self._writing = self._thread.submit(partial(work.func, step, copies, *work.args[2:]))
        self.newest = step

    def wait(self) -> None:
        """Waits until what was saved in the background is committed. Raises CannotSave on every rank where it could not be."""
        if self.config.background:
            writing, self._writing = self._writing, None
            self._together(lambda: writing and writing.result())

    def _together(self, action: Callable[[], object]) -> None:
        """Rank 0 does it; where it cannot, no rank can."""
        try:
            distributed.first_does(action, self.ranks)
        except ConfigError as error:  # on the other ranks
            raise CannotSave(str(error)) from error

    def _stage(self, step: int, tensors: dict[str, Tensor]) -> Path:
        """Where all ranks have put their shares of the tensors. Raises CannotSave on every rank, after as many attempts as a commit has."""
        folder = self.folder.checkpoints / f"{checkpoint.path_of(self.folder.checkpoints, step).name}.tmp-shares"
        for pause in (*checkpoint.PAUSES_SECONDS, None):
            try:
                stored.stage(tensors, folder, self.ranks)
                break
            except OSError as error:
                if self.ranks.first:
                    shutil.rmtree(folder, ignore_errors=True)
                if pause is None:
                    raise CannotSave(
                        f"{error}; the checkpoints before it are as they were: make room, then run the same command"
                    ) from error
                time.sleep(pause)
        return folder

    def _commit(self, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], facts: dict[str, Any], shares: Path | None) -> Path:
        def write(temporary: Path) -> None:
            """The rows up to this step first: a resumed run finds them beside the checkpoint."""
            self.folder.flush(durable=True)
            checkpoint.write(temporary, tensors, scalars, shares)

        keep, every = self.config.keep, self.config.keep_every
        try:
            return checkpoint.commit(self.folder.checkpoints, step, write, facts=facts, keep=keep, keep_every=every)
        finally:
            if shares is not None:
                shutil.rmtree(shares, ignore_errors=True)

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints after a step: a run that has gone back to it takes another way from there."""
        later = [checkpoint.path_of(self.folder.checkpoints, s) for s in checkpoint.steps(self.folder.checkpoints) if s > step]

        def remove() -> None:
            for path in later:
                shutil.rmtree(path)

        distributed.first_does(remove, self.ranks)
        self.newest = None

    def find(self, until: int | None = None) -> Path | None:
        """The newest checkpoint (of at most step `until`) that every rank finds undamaged, the same on all; None where there is none.

        Raises ConfigError where it belongs to another configuration or other images than this run.
        """
        below, folder = math.inf if until is None else until + 1, self.folder.checkpoints
        while True:
            steps = [s for s in checkpoint.steps(folder) if s < below] if self.ranks.first else []
            below = distributed.from_first(steps[-1] if steps else -1, self.ranks)
            if below < 0:
                return None
            path = checkpoint.path_of(folder, int(below))
            problem = self._problem(path)
            if problem is not None:
                log.error("checkpoint %s is passed over: %s", path, problem)
            if not distributed.any_rank(problem is not None, self.ranks):
                self._check(path)
                return path

    def _problem(self, path: Path) -> str | None:
        deadline = time.monotonic() + (0 if self.ranks.first else PATIENCE_SECONDS)
        while not (path / checkpoint.MANIFEST).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        return checkpoint.verify(path)

    def _check(self, path: Path) -> None:
        theirs = checkpoint.manifest(path)
        unlike = [k for k in ("config", "data") if theirs.get(k) != self.facts[k]]
        if unlike:
            raise ConfigError(
                f"{path} was not made by this run: its {unlike[0]} is {theirs.get(unlike[0])}, not {self.facts[unlike[0]]}; "
                "move it away or choose another run.dir=..."
            )


def see_the_same(folder: RunFolder, ranks: Ranks) -> None:
    """Looks, on every rank, for what rank 0 has just written to status.json of the run folder.

    Raises ConfigError where a host sees another folder: resumed ranks there would find no checkpoint, and the run would begin anew.
    """
    if ranks.world == 1:
        return
    holder, deadline = int(distributed.from_first(os.getpid(), ranks)), time.monotonic() + PATIENCE_SECONDS
    while (found := _holder(folder)) != holder and time.monotonic() < deadline:
        time.sleep(0.2)
    if distributed.any_rank(found != holder, ranks):
        raise ConfigError(f"not every host sees the run folder {folder.path}: choose a run.dir=... on a file system that all of them share")


def _holder(folder: RunFolder) -> int | None:
    try:
        return json.loads((folder.path / "status.json").read_text())["pid"]
    except (OSError, ValueError):  # not there yet
        return None
