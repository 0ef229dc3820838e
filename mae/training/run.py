"""The run folder: what a run was told, what it measured, how it stands. One process at a time may write to it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from mae.config import Config
from mae.errors import ConfigError

log = logging.getLogger("mae")

# What may differ when a run is continued: it decides how the work is done, not what comes out.
EXECUTION = re.compile(
    r"data\.(workers|damage)|train\.(device|timeout|parallel|recompute|accumulate|compile|skip_updates|spike|check_replicas)"
    r"|train\.(log|checkpoint|evaluate)_every|track\..*|run\..*"
)


def default_folder(config: Config) -> Path:
    """run.dir, or runs/DATA-METHOD (-sN for seed N > 0), or runs/SWEEP/RUN_ID inside a W&B sweep."""
    if config.run.dir is not None:
        return Path(config.run.dir)
    sweep, run_id = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if sweep and run_id:
        return Path("runs") / sweep / run_id
    seed = f"-s{config.train.seed}" if config.train.seed else ""
    return Path("runs") / f"{config.data.name}-{config.method['name']}{seed}"


class RunFolder:
    """Reads and writes the files of one run. Making the object touches nothing; `create` makes the folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics, self.results = self.path / "metrics.jsonl", self.path / "results.json"
        self.checkpoints, self.encoder, self.figures = self.path / "checkpoints", self.path / "encoder", self.path / "figures"
        self._unwritten, self._appending = b"", threading.Lock()  # rows that a full disk holds back; a background save flushes them too

    def config(self) -> dict[str, Any] | None:
        """The configuration that the run was started with, or None where there is no run."""
        file = self.path / "config.yaml"
        return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(file))) if file.is_file() else None

    def classifier(self) -> Path | None:
        """Where a fine-tuning has left its encoder, in timm's layout; None of pretraining. Raises ConfigError where a run leaves none."""
        protocol = (self.config() or {}).get("protocol") or {}
        if not protocol:
            return None
        if not protocol["name"].startswith("finetune/"):
            raise ConfigError(f"{self.path} is a probe, which leaves its encoder as it is: give the run or file of that encoder")
        if not (self.path / "classifier").is_dir():
            raise ConfigError(f"{self.path} is a fine-tuning that has not come to its end: run the same command again, it goes on")
        return self.path / "classifier"

    def check(self, config: Config) -> None:
        """Raises ConfigError where the folder belongs to another configuration or to something that is no run."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"run.dir {self.path} is a file: choose another run.dir")
        theirs = self.config()
        if theirs is None:
            # a start that was killed early leaves the lock and what was to become config.yaml
            if any(not re.fullmatch(r"\.lock|config\.yaml\.tmp-\w+", file.name) for file in self.path.iterdir()):
                raise ConfigError(f"run.dir {self.path} holds other things than a run: choose an empty or new run.dir")
            return
        there, here = decisive(theirs), decisive(config.as_dict())
        unlike = [k for k in sorted(there.keys() | here.keys()) if there.get(k) != here.get(k)]
        if unlike:
            shown = ", ".join(f"{k} was {there.get(k)!r} and is now {here.get(k)!r}" for k in unlike[:5])
            raise ConfigError(f"{self.path} belongs to a run of another configuration ({shown}): choose another run.dir=...")

    def create(self, config: Config, derived: Mapping[str, Any]) -> None:
        """Makes the folder with config.yaml and, beside it, derived.json: what follows from the configuration here."""
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.glob("*.tmp-*"):
            leftover.unlink()
        file = self.path / "config.yaml"
        if not file.exists():  # the first file: what is in the folder of a run without one is not of a run
            write_whole(file, OmegaConf.to_yaml(OmegaConf.create(config.as_dict())))
        self.figures.mkdir(exist_ok=True)
        write_whole(self.path / "derived.json", json.dumps(derived, indent=1))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder for this process. Raises ConfigError naming host and pid where another one holds it.

        The lock is the kernel's, so that a dead holder's is free at once.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                raise ConfigError(f"{self.path} is in use by {holder}: wait for it, stop it, or choose another run.dir") from error
            except OSError as error:
                log.warning("%s cannot be locked (%s): see to it that no other job writes there", self.path, error.strerror)
            lock.truncate(0)
            lock.write(f"host {socket.gethostname()}, pid {os.getpid()}")
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
                lock.flush()
            yield

    def status(self, state: str, **facts: Any) -> None:
        """Writes status.json: running | done | preempted | failed, with host and pid; on a full disk into the blocks that the file has."""
        row = {"status": state, "host": socket.gethostname(), "pid": os.getpid(), **facts}
        file, text = self.path / "status.json", json.dumps(row, indent=1)
        try:
            write_whole(file, text)
        except OSError as error:
            try:
                with open(file, "r+b", buffering=0) as stream:  # one write of less than a block, padded to what was there
                    stream.write(text.encode().ljust(os.fstat(stream.fileno()).st_size))
            except OSError:
                log.error("%s cannot be written (%s): the run is %s", file, error.strerror, state)

    def say(self, sentences: Sequence[str]) -> None:
        """Writes diagnosis.json: what the run tells about itself, in sentences."""
        write_whole(self.path / "diagnosis.json", json.dumps(list(sentences), indent=1))

    def derived(self) -> dict[str, Any] | None:
        """What followed from the configuration when the run was last started, or None."""
        file = self.path / "derived.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def note(self, **facts: Any) -> None:
        """Adds facts to derived.json that are known only later, such as what a step costs."""
        write_whole(self.path / "derived.json", json.dumps((self.derived() or {}) | facts, indent=1))

    def state(self) -> str | None:
        """The status that was written last, or None."""
        file = self.path / "status.json"
        return json.loads(file.read_text())["status"] if file.is_file() else None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row to metrics.jsonl. One that cannot be written is kept for the next time, so that a full disk ends no step."""
        with self._appending:
            waiting = bool(self._unwritten)
            self._unwritten += (json.dumps(row) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            log.log(
                logging.DEBUG if waiting else logging.WARNING,
                "%s cannot be written (%s): its rows are kept until it can",
                self.metrics,
                error.strerror,
            )

    def flush(self, *, durable: bool = False) -> None:
        """Writes the rows that are kept back, all or none of them; `durable` waits for the disk. Raises OSError."""
        with self._appending, open(self.metrics, "ab", buffering=0) as stream:
            start = stream.tell()
            try:
                if stream.write(self._unwritten) < len(self._unwritten):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                stream.truncate(start)
                raise
            self._unwritten = b""
            if durable:
                os.fsync(stream.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that a kill cut off is left out."""
        rows = []
        for line in self.metrics.read_text().splitlines() if self.metrics.is_file() else []:
            try:
                rows.append(json.loads(line))
            except ValueError:
                continue
        return rows

    def rewind(self, step: int) -> None:
        """Takes back the rows after a step: a resumed run takes those steps, and logs them, again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        if self.metrics.is_file():
            write_whole(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys of a configuration that decide what comes out of a run, with their values."""
    return {key: value for key, value in _flat(config).items() if not EXECUTION.fullmatch(key)}


def fingerprint(config: Config) -> str:
    """A hash of what decides what comes out of a run: two runs with the same one are the same run."""
    told = {key: value for key, value in decisive(config.as_dict()).items() if value is not None}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def write_whole(file: Path, text: str) -> None:
    """Replaces a file in one step: a reader sees all of the new text or the one before, after a power cut too. Raises OSError."""
    temporary = file.with_name(f"{file.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
