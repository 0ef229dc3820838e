"""The story of comparing: finished runs in; a table, a spreadsheet and one page to read out."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from mae import config
from mae.commands import door, options
from mae.config import Config
from mae.errors import ConfigError
from mae.reporting import page, tidy
from mae.reporting.records import Record, group
from mae.reporting.summary import tables
from mae.training.run import RunFolder, decisive, write_whole
from mae.training.tracking import Tracker

log = logging.getLogger("mae")

USAGE = """
usage: mae compare RUN... --out DIR [--separate] [track.key=value ...]

Compares finished runs and makes DIR: comparison.md (a table), comparison.csv (a row for every figure), report.html (one page that
needs no network: ranking with intervals, curves, pictures, cost, how each figure was measured). Runs that differ only in train.seed
are one row. Figures that were not obtained alike are refused and the difference is named.

  --out DIR    folder
  --separate   gives figures that were not obtained alike tables of their own
"""
UNDECISIVE = ("train.seed", "evaluate.", "protocol.")  # keys that decide no weight, or only which seed of a row a run is


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=("track",))


def _story(words: list[str]) -> None:
    runs, out, separate, tracking = _arguments(words)
    cfg = config.load(tracking)
    records = [read(run, finished=True) for run in runs]
    files = write(records, out, separate=separate)
    print((out / "comparison.md").read_text())
    print("\n".join(map(str, files)))
    mirror(cfg, records, out, separate=separate)


def write(records: Sequence[Record], out: Path, *, separate: bool) -> list[Path]:
    """Makes comparison.md, comparison.csv and report.html in `out`; returns them. Raises ConfigError before anything is written."""
    groups = group(records)
    found = tables(groups, separate=separate)
    texts = {
        "comparison.md": tidy.markdown(found, groups),
        "comparison.csv": tidy.csv_text(groups),
        "report.html": page.html(found, groups),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(out / name, text)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error.strerror}): choose another folder for --out") from error
    return [out / name for name in texts]


def refresh(run: Path) -> Path | None:
    """Makes RUN/report.html from what the run has measured so far; returns it, or None where that failed, which stops nothing."""
    try:
        groups = group([read(run, finished=False)])
        write_whole(run / "report.html", page.html(tables(groups, separate=True), groups))
        return run / "report.html"
    except Exception as error:  # the results are in results.json whatever becomes of the page
        log.warning("%s/report.html is not written: %s: %s", run, type(error).__name__, error)
        return None


def read(path: Path, *, finished: bool) -> Record:
    """One run as plain data. Raises ConfigError where there is none, where it has no results, and, with `finished`, where it goes on."""
    folder = RunFolder(path)
    hint = "give the folders of finished runs, such as runs/digits-mae"
    if not path.exists():
        raise ConfigError(f"there is no {path}: {hint}")
    settings = folder.config()
    if settings is None and not folder.results.is_file():
        raise ConfigError(f"{path} is no run folder, it has neither config.yaml nor results.json: {hint}")
    if finished and settings is not None and folder.state() != "done":
        raise ConfigError(f"{path} is not finished ({folder.state() or 'never started'}): run its command again, then compare")
    try:
        entries = json.loads(folder.results.read_text()) if folder.results.is_file() else []
    except ValueError as error:
        raise ConfigError(f"{folder.results} is damaged ({error}): evaluate the run again, or leave it out") from error
    if finished and not any(not e["encoder"]["name"].startswith("control:") for e in entries):
        raise ConfigError(f"{path} has no results: measure it with `mae evaluate {path} configs/evaluation/knn.yaml`")
    said = path / "diagnosis.json"
    flat = decisive(settings) if settings is not None else {"encoder": next((e["encoder"]["name"] for e in entries), path.name)}
    return Record(
        name=path.resolve().name,
        path=path,
        method=str((settings or {}).get("method", {}).get("name") or flat["encoder"]),
        seed=int(flat.get("train.seed", 0)),
        settings={k: v for k, v in flat.items() if not k.startswith(UNDECISIVE)},
        entries=entries,
        rows=folder.rows(),
        derived=folder.derived() or {},
        sentences=json.loads(said.read_text()) if said.is_file() else [],
    )


def mirror(cfg: Config, records: Sequence[Record], out: Path, *, separate: bool) -> None:
    """Sends the same content to W&B, where tracking is on: tables, pictures and the page, as a run of job type `compare`."""
    told = {"runs": [str(r.path) for r in records], "separate": separate}
    tracker = Tracker(cfg, out, "compare", name=out.resolve().name, derived={}, settings=told)
    if not tracker.on:
        return
    groups = group(records)
    tracker.table("figures", list(tidy.FIELDS), [[row[k] for k in tidy.FIELDS] for row in tidy.rows(groups)])
    for number, table in enumerate(tables(groups, separate=separate), 1):
        tracker.table(f"ranking/{number}", *tidy.grid(table))
    for record in records:
        for file in sorted((record.path / "figures").glob("*.png")):
            tracker.images(f"{file.stem}/{record.name}", [file], step=0)
    tracker.page("report", out / "report.html")
    tracker.finish()


def _arguments(words: list[str]) -> tuple[list[Path], Path, bool, list[str]]:
    """The runs, each once, --out, --separate, and the words that configure tracking."""
    separate = "--separate" in words
    given, rest = options.take([word for word in words if word != "--separate"], "out")
    arguments, words = config.split_words(rest)
    for word in words:
        if not word.startswith("track."):
            raise ConfigError(f"{word} changes nothing in finished runs: only track.* can be set here")
    if not arguments:
        raise ConfigError("compare which runs? Give their folders, such as runs/digits-mae runs/digits-vae")
    folder = Path(given["out"]).expanduser()
    if folder.is_file():
        raise ConfigError(f"--out {folder} is a file: give a folder")
    runs = {path.resolve(): path for path in (Path(a).expanduser() for a in arguments)}
    return list(runs.values()), folder, separate, words
