"""Real runs as real processes, for what must survive being killed: starting, watching, killing, and looking for what is left.

Every process of a run is known by a mark in its environment, wherever it moves. Used by benchmarks/chaos.py and tests/test_chaos.py.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
HANG_SECONDS = 240  # without a new row or an exit, a run counts as hanging
# The smallest run that has everything: a few thousand weights, a step in some milliseconds.
TINY = ["encoder.embed_dim=32", "encoder.depth=1", "method.decoder_depth=1", "train.precision=fp32", "train.log_every=1"]
TINY += ["evaluate.protocols=[]", "evaluate.controls=false", "track.wandb=off"]

# A rank's program: the door, and its exit code on file, since a launcher tells only one of them.
RANK = """
import os, sys
from mae.commands.pretrain import main

if __name__ == "__main__":  # the processes that read images import this file too
    code = main()
    with open(os.path.join(os.environ["CODES"], f"{os.getpid()}-{code}"), "w"):
        pass
    sys.exit(code)
"""


class Hang(Exception):
    """A run neither stepped nor ended for too long."""


class Started:
    """A started run: its launcher (torchrun, or the one process itself) and everything below."""

    def __init__(
        self,
        folder: Path,
        words: list[str],
        *,
        ranks: int = 1,
        restarts: int = 0,
        options: Sequence[str] = (),
        beside: Path | None = None,
    ) -> None:
        """`folder` is its run.dir; with more than one rank torchrun is above them, with `restarts` and other options of it.

        `beside` (default: the folder's parent) is where its output goes.
        """
        self.folder, self.ranks = folder, ranks
        self.work = beside or folder.parent
        self.codes = self.work / f"codes-{time.monotonic_ns()}"
        self.codes.mkdir(parents=True)
        program = self.work / "rank.py"
        program.write_text(RANK)
        command = [sys.executable]
        if ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={restarts}"]
            command += ["-m", *launcher, *options]
        self.mark = f"chaos-{os.getpid()}-{time.monotonic_ns()}"
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CODES": str(self.codes), "CHAOS_MARK": self.mark, "PYTHONPATH": paths}
        self.output = self.work / f"output-{self.folder.name}.txt"
        self._rows = _inode(folder / "metrics.jsonl")
        with open(self.output, "ab") as stream:
            start = stream.tell()
            self.began = time.monotonic()
            self.launcher = subprocess.Popen(
                [*command, str(program), f"run.dir={folder}", *words],
                cwd=self.work,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self._start = start
        self._resumes_at = newest_checkpoint(folder)

    def said(self) -> str:
        """What it has written to its terminal since it was started."""
        return self.output.read_bytes()[self._start :].decode(errors="replace")

    def pids(self) -> dict[int, str]:
        """Its living processes: id -> command line."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"CHAOS_MARK={self.mark}".encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def rank_pids(self) -> list[int]:
        """The ranks' processes, without the launcher and the ranks' helpers, in the order of their ranks."""
        if self.ranks == 1:
            return [self.launcher.pid]
        ranks = {}
        for pid, line in self.pids().items():
            with contextlib.suppress(OSError):
                if "rank.py" in line and "torch.distributed.run" not in line and _parent(pid) == self.launcher.pid:
                    environment = dict(e.split(b"=", 1) for e in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in e)
                    ranks[int(environment[b"RANK"])] = pid
        return [pid for _, pid in sorted(ranks.items())]

    def wait_for_step(self, step: int) -> None:
        """Returns when metrics.jsonl has a row of this step or a later one, or the run has ended. Raises Hang."""
        last, seen = time.monotonic(), None
        while self.launcher.poll() is None:
            size = _size(self.folder / "metrics.jsonl")
            if size != seen:
                last, seen = time.monotonic(), size
                if last_step(self.folder) >= step:
                    return
            if time.monotonic() - last > HANG_SECONDS:
                raise Hang(f"no row for {HANG_SECONDS} s; {self.said()[-2000:]}")
            time.sleep(0.01)

    def wait_for_new_step(self) -> float:
        """Seconds from the command to the first step that was not in the checkpoint it began with. Raises Hang."""
        while self.launcher.poll() is None:
            # a start takes the rows after its checkpoint back by replacing the file
            if _inode(self.folder / "metrics.jsonl") != self._rows and last_step(self.folder) > self._resumes_at:
                break
            if time.monotonic() - self.began > HANG_SECONDS:
                raise Hang(f"no step after {HANG_SECONDS} s; {self.said()[-2000:]}")
            time.sleep(0.01)
        return time.monotonic() - self.began

    def wait(self, seconds: float = HANG_SECONDS) -> int:
        """The launcher's exit code. Raises Hang when there is none in time, with nothing left alive."""
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            self.clear()
            raise Hang(f"not ended after {seconds:g} s; {self.said()[-2000:]}") from None

    def kill_all(self) -> None:
        """SIGKILL to every process of the run at once, as a machine that goes away or a scheduler at its time limit."""
        for pid in [self.launcher.pid, *self.pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.launcher.wait()

    def exit_codes(self) -> list[int]:
        """What the ranks that came to their end exited with."""
        return [int(file.name.partition("-")[2]) for file in self.codes.iterdir()]

    def orphans(self, seconds: float = 20) -> dict[int, str]:
        """Processes that are still there so long after the launcher ended; none is left alive."""
        deadline = time.monotonic() + seconds
        while (left := self.pids()) and time.monotonic() < deadline:
            time.sleep(0.1)
        self.clear()
        return left

    def clear(self) -> None:
        """Leaves nothing of the run alive."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            self.launcher.kill()
        self.launcher.wait()


def rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The rows of training steps in metrics.jsonl, by step; one that is cut off is left out."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if "batch_hash" in row:
                found[row["step"]] = row
    return found


def last_step(folder: Path) -> int:
    """The newest step in metrics.jsonl, 0 without one."""
    return max(rows(folder), default=0)


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in (folder / "checkpoints").glob("step-*"))
    return max((int(name[1]) for name in names if name), default=0)


def status(folder: Path) -> dict[str, Any]:
    """status.json, or {}."""
    file = folder / "status.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def state(folder: Path) -> dict[str, Any]:
    """Every tensor of a run's newest checkpoint, weights and optimizer: name -> tensor."""
    return load_file(folder / "checkpoints" / f"step-{newest_checkpoint(folder):08d}" / "state.safetensors")


def shared_memory() -> set[str]:
    """What torch and multiprocessing have left in /dev/shm: of no living process, whoever's it was."""
    found = {}
    for file in Path("/dev/shm").glob("*"):
        if file.name.startswith(("torch_", "sem.mp-")):
            with contextlib.suppress(OSError):
                found[str(file.stat().st_ino)] = file.name
    for maps in Path("/proc").glob("[0-9]*/maps") if found else ():
        with contextlib.suppress(OSError):  # by inode: a semaphore is mapped under the name that it was made with
            for line in maps.read_text().splitlines():
                if "/dev/shm/" in line:
                    found.pop(line.split()[4], None)
    return set(found.values())


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def _inode(file: Path) -> int | None:
    return file.stat().st_ino if file.is_file() else None


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
