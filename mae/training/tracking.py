"""W&B as a mirror of the run folder: whatever happens to it, training goes on and metrics.jsonl stays the truth.

All of it happens in a thread of its own, so that a server, a network or a W&B process that does not answer holds up nothing.
"""

import configparser
import contextlib
import io
import json
import logging
import netrc
import os
import queue
import secrets
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from mae.config import Config
from mae.training.lineage import Artifact
from mae.training.run import write_whole

if TYPE_CHECKING:  # torch: commands that answer from words alone do without it
    from mae.training.histograms import Histogram

log = logging.getLogger("mae")

# seconds; W&B's own variables. Its default of 90 for the first holds a record up for nothing, and its default for the second is for ever.
INIT_TIMEOUT = float(os.environ.get("WANDB_INIT_TIMEOUT", 30))
FINISH_TIMEOUT = float(os.environ.get("WANDB_FINISH_TIMEOUT", 300))
WAITING = 10_000  # things to send that may pile up
LAST_WORDS_SECONDS = 5  # for a W&B that was ended to notice it
MODES = {"offline": "offline", "dryrun": "offline", "disabled": "off", "online": "online", "run": "online"}  # of WANDB_MODE, old names too
PUBLIC = "https://api.wandb.ai"


class Tracker:
    """Mirrors one job (pretrain, linear_probe, finetune, compare) to W&B, or does nothing where tracking is off."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        job: str,
        *,
        name: str,
        derived: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,  # what the job was told, where that is not the configuration
    ) -> None:
        self.mode = mode(config.track.wandb)
        self.run: Any = None  # of W&B; the thread's alone
        self.given_up = False
        self._said: set[str] = set()
        if self.mode == "off":
            return
        started: dict[str, Any] = dict(
            project=config.track.project,
            group=config.track.group or name,
            job_type=job,
            name=f"{name}/{job}",
            tags=list(config.track.tags),
            dir=str(folder.resolve()),  # a service that another process of the user has started stands elsewhere
            config={**(config.as_dict() if settings is None else settings), "derived": dict(derived)},
        )
        self._waiting: queue.Queue[Callable[[], Any] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._waiting.put(lambda: self._begin(folder, job, started))
        self._thread.start()

    @property
    def on(self) -> bool:
        """Whether anything is mirrored."""
        return self.mode != "off"

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirrors a row of metrics.jsonl; its own `step` is the axis, so that resumed steps are not dropped."""
        self._do(lambda: self.run.log(dict(row)))

    def images(self, name: str, files: Sequence[Path], step: int) -> None:
        """Mirrors pictures as their files are now: the next ones may have overwritten them by the time that these are sent."""
        if self.on and (contents := [content for file in files if (content := self._read(file))]):
            self._do(lambda: self.run.log({name: [self.wandb.Image(Image.open(io.BytesIO(c))) for c in contents], "step": step}))

    def pictures(self, files: Sequence[Path], step: int) -> None:
        """Mirrors pictures, each in a panel of the file's name."""
        for file in files:
            self.images(file.stem, [file], step)

    def results(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Mirrors evaluations: a table, and each figure of the encoder itself in the run's summary."""

        def send() -> None:
            """The table and the summary, as W&B takes them."""
            columns = ["encoder", "protocol", "data", "split", "seed", "metric", "value"]
            table = self.wandb.Table(columns=columns)
            for e in entries:
                for metric, value in e["metrics"].items():
                    table.add_data(e["encoder"]["name"], e["protocol"], e["data"], e["split"], e["seed"], metric, value)
                    if not e["encoder"]["name"].startswith("control:"):
                        self.run.summary[f"{e['protocol']}/{metric}"] = value
            self.run.log({"results": table})

        self._do(send)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Sends a table; arrays in it are images, (H, W) or (H, W, C) uint8."""

        def send() -> None:
            """The rows as W&B takes them."""
            data = [[self.wandb.Image(cell) if isinstance(cell, np.ndarray) else cell for cell in row] for row in rows]
            self.run.log({name: self.wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)})

        self._do(send)

    def page(self, name: str, file: Path) -> None:
        """Sends an HTML page as its file is now."""
        if self.on and (content := self._read(file)):
            self._do(lambda: self.run.log({name: self.wandb.Html(content.decode(), inject=False)}))

    def made(self, artifact: Artifact) -> None:
        """Records what the job has made, with its files."""
        self._do(lambda: self.run.log_artifact(artifact.built(self.wandb)))

    def uses(self, artifact: Artifact) -> None:
        """Records what the job has read."""

        def send() -> None:
            """As W&B takes what is perhaps new to it."""
            if self.run.offline:  # where use_artifact refuses; this is what it does for an artifact that is made here
                self.run._log_artifact(artifact.built(self.wandb), is_user_created=True, use_after_commit=True)
            else:
                self.run.use_artifact(artifact.built(self.wandb))

        self._do(send)

    def histograms(self, found: Mapping[str, "Histogram"], step: int) -> None:
        """Sends histograms by name."""
        self._do(lambda: self.run.log({**{k: self.wandb.Histogram(np_histogram=h) for k, h in found.items()}, "step": step}))

    def alert(self, title: str, text: str) -> None:
        """Sends a message that W&B passes on by mail or chat."""
        self._do(lambda: self.run.alert(title=title, text=text))

    def finish(self, exit_code: int = 0, *, within: float = FINISH_TIMEOUT) -> None:
        """Closes the mirror, in so many seconds at most; a non-zero code marks the run as failed."""
        if not self.on:
            return
        self._do(lambda: self.run.finish(exit_code=exit_code))
        self.mode = "off"
        deadline = time.monotonic() + within
        with contextlib.suppress(queue.Full):
            self._waiting.put(None, timeout=within)
        self._thread.join(max(deadline - time.monotonic(), 0))
        if self._thread.is_alive():
            log.warning("W&B has not taken everything within %g s: `wandb sync` sends what is on disk, metrics.jsonl has it all", within)
            self.given_up = True
            _end_process()
            self._thread.join(LAST_WORDS_SECONDS)

    def _read(self, file: Path) -> bytes | None:
        """What is in a file now; None, and a sentence, where it cannot be read."""
        try:
            return file.read_bytes()
        except OSError as error:
            self._say(f"{file} is not sent to W&B: {error.strerror}")
            return None

    def _do(self, action: Callable[[], Any]) -> None:
        """In its turn, in the thread; not where W&B could not be started."""
        if self.on:
            try:
                self._waiting.put_nowait(lambda: self.run and action())
            except queue.Full:
                self._say("W&B does not keep up: what comes now is in metrics.jsonl alone")

    def _work(self) -> None:
        """The thread: one thing after the other, until it is told that there is no more, or nobody waits for it any more."""
        while (action := self._waiting.get()) is not None and not self.given_up:
            self._try(action)
        if self._said:  # now, and not when the process ends, where it would raise again
            with contextlib.suppress(Exception):
                self.wandb.teardown()

    def _begin(self, folder: Path, job: str, started: dict[str, Any]) -> None:
        import wandb  # an import of seconds: only where it is used

        self.wandb = wandb
        own = os.environ.get("WANDB_RUN_ID") or self._id(folder, job)  # offline too: `wandb sync` takes the parts of a run for one
        if self.mode == "online":
            settings = wandb.Settings(init_timeout=INIT_TIMEOUT)
            self.run = self._try(lambda: wandb.init(mode="online", settings=settings, id=own, resume="allow", **started))
            if self.run is None and not self.given_up:
                self._say(f"W&B cannot be reached: the run is recorded offline, `wandb sync {folder}/wandb/offline-*` sends it later")
        if self.run is None and not self.given_up:
            self.run = self._try(lambda: wandb.init(mode="offline", id=own, **started))
        if self.run is not None:
            self._try(lambda: [self.run.define_metric("step"), self.run.define_metric("*", step_metric="step")])

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # the mirror may fail in any way; training must not
            self._say(f"W&B: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return None

    def _say(self, sentence: str) -> None:
        """Once."""
        if sentence not in self._said:
            self._said.add(sentence)
            log.warning("%s", sentence)

    def _id(self, folder: Path, job: str) -> str:
        """The W&B id of this run folder's job, made at the first start."""
        file = folder / "wandb.json"
        ids = json.loads(file.read_text()) if file.is_file() else {}
        if job not in ids:
            ids[job] = secrets.token_hex(4)
            write_whole(file, json.dumps(ids))
        return ids[job]


def mode(wanted: str) -> str:
    """What track.wandb comes to here: online | offline | off.

    auto is online where a key is configured, else off; WANDB_MODE, where set, is obeyed under auto.
    """
    if wanted != "auto":
        return wanted
    from_environment = MODES.get(os.environ.get("WANDB_MODE", ""))
    return from_environment or ("online" if os.environ.get("WANDB_API_KEY") or _logged_in() else "off")


def _logged_in() -> bool:
    """Whether `wandb login` has left a key for the server that is configured: a company's own, or that of the public."""
    try:
        kept = configparser.ConfigParser()
        kept.read(Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings")
        server = os.environ.get("WANDB_BASE_URL") or kept.get("default", "base_url", fallback=PUBLIC)
        keys = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
        return keys.is_file() and urlsplit(server).netloc in netrc.netrc(keys).hosts
    except (configparser.Error, netrc.NetrcParseError, OSError, ValueError):
        return False


def _end_process() -> None:
    """Ends W&B's own process, which this process started and would wait for at its end. Linux tells which that is."""
    for child in Path("/proc/self/task").glob("*/children"):
        for pid in child.read_text().split():
            with contextlib.suppress(OSError):
                if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(int(pid), signal.SIGKILL)
