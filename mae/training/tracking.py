"""W&B as a mirror of the run folder: whatever happens to it, training goes on and metrics.jsonl stays the truth."""

import json
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mae.config import Config

log = logging.getLogger("mae")

INIT_TIMEOUT = float(os.environ.get("WANDB_INIT_TIMEOUT", 30))  # seconds; W&B's own variable, its default of 90 holds a job up for nothing


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
        self.run: Any = None
        mode = _mode(config.track.wandb)
        if mode == "off":
            return
        import wandb  # an import of seconds: only where it is used

        self.wandb = wandb
        started: dict[str, Any] = dict(
            project=config.track.project,
            group=config.track.group or name,
            job_type=job,
            name=f"{name}/{job}",
            tags=list(config.track.tags),
            dir=str(folder),
            config={**(config.as_dict() if settings is None else settings), "derived": dict(derived)},
        )
        if mode == "online":
            started |= dict(id=os.environ.get("WANDB_RUN_ID") or self._id(folder, job), resume="allow")
            self.run = self._try(lambda: wandb.init(mode="online", settings=wandb.Settings(init_timeout=INIT_TIMEOUT), **started))
            if self.run is None:
                log.warning("W&B cannot be reached: the run is recorded offline, `wandb sync %s/wandb/offline-*` sends it later", folder)
                started.pop("resume"), started.pop("id")
        if self.run is None:
            self.run = self._try(lambda: wandb.init(mode="offline", **started))
        if self.run is not None:
            self._try(lambda: [self.run.define_metric("step"), self.run.define_metric("*", step_metric="step")])

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirrors a row of metrics.jsonl; its own `step` is the axis, so that resumed steps are not dropped."""
        self._do(lambda: self.run.log(dict(row)))

    def images(self, name: str, files: Sequence[Path], step: int) -> None:
        """Mirrors pictures."""
        self._do(lambda: self.run.log({name: [self.wandb.Image(str(f)) for f in files], "step": step}))

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
        """Sends a table."""
        self._do(
            lambda: self.run.log({name: self.wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)})
        )

    def page(self, name: str, file: Path) -> None:
        """Sends an HTML page."""
        self._do(lambda: self.run.log({name: self.wandb.Html(file.read_text(encoding="utf-8"), inject=False)}))

    def artifact(self, folder: Path, name: str, kind: str) -> None:
        """Sends a folder (the encoder) as an artifact."""

        def send() -> None:
            """The folder's files, as W&B takes them."""
            artifact = self.wandb.Artifact(name.replace("/", "-"), type=kind)
            artifact.add_dir(str(folder))
            self.run.log_artifact(artifact)

        self._do(send)

    def alert(self, title: str, text: str) -> None:
        """Sends a message that W&B passes on by mail or chat."""
        self._do(lambda: self.run.alert(title=title, text=text))

    def finish(self, exit_code: int = 0) -> None:
        """Closes the mirror; a non-zero code marks the run as failed."""
        self._do(lambda: self.run.finish(exit_code=exit_code))
        self.run = None

    def _do(self, action: Callable[[], Any]) -> None:
        if self.run is not None:
            self._try(action)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # the mirror may fail in any way; training must not
            log.warning("W&B: %s: %s", type(error).__name__, str(error).splitlines()[0] if str(error) else "")
            return None

    def _id(self, folder: Path, job: str) -> str:
        """The W&B id of this run folder's job, made at the first start."""
        file = folder / "wandb.json"
        ids = json.loads(file.read_text()) if file.is_file() else {}
        if job not in ids:
            ids[job] = secrets.token_hex(4)
            file.write_text(json.dumps(ids))
        return ids[job]


def _mode(wanted: str) -> str:
    """online | offline | off; auto is online where a key is configured, else off. WANDB_MODE, where set, is obeyed under auto."""
    if wanted != "auto":
        return wanted
    from_environment = {"offline": "offline", "disabled": "off", "online": "online"}.get(os.environ.get("WANDB_MODE", ""))
    if from_environment:
        return from_environment
    try:
        logged_in = "api.wandb.ai" in (netrc.netrc().hosts if (Path.home() / ".netrc").is_file() else {})
    except (netrc.NetrcParseError, OSError):
        logged_in = False
    return "online" if os.environ.get("WANDB_API_KEY") or logged_in else "off"
