"""Atomic, verified, pickle-free checkpoints: a folder of safetensors and JSON, sealed by a manifest of SHA-256 sums.

A checkpoint is written under a temporary name, synced, sealed and renamed; what has no valid manifest does not count. Tensors
go to safetensors and scalars to JSON, so that loading one never executes code. Hashes give integrity, not authenticity.
"""

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mae.errors import CannotSave
from mae.training import stored
from mae.training.state import part
from mae.training.stored import Stored

log = logging.getLogger("mae")
SCALARS, MANIFEST = "state.json", "manifest.json"
PAUSES_SECONDS = (0.5, 2.0)  # before the second and the third attempt at a save: a full disk may be on the way of being emptied


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    *,
    facts: Mapping[str, Any],
    keep: int,
    keep_every: int | None = None,
    staged: Path | None = None,
) -> Path:
    """Commits folder/step-NNNNNNNN with the state in it; `staged` as for `write`, `facts`, `keep` and what is raised as `commit` says."""

    return commit(folder, step, lambda temporary: write(temporary, tensors, scalars, staged), facts=facts, keep=keep, keep_every=keep_every)


def write(folder: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any], staged: Path | None = None) -> None:
    """The files of a state: its tensors, or what all ranks have `staged` of them (stored.stage), and its scalars."""
    if staged is None:
        stored.write(tensors, folder)
    else:
        stored.adopt(staged, folder)
    (folder / SCALARS).write_text(json.dumps(scalars, indent=1))


def commit(
    folder: Path, step: int, fill: Callable[[Path], None], *, facts: Mapping[str, Any], keep: int, keep_every: int | None = None
) -> Path:
    """Lets `fill(temporary folder)` make the files, seals and renames them, then prunes.

    `facts` go into the manifest. Kept are the `keep` newest up to this step and those of every `keep_every`-th step; later ones (passed
    over as damaged when the run was resumed) stay until the run gets there again. After an input/output error there are two more attempts,
    then CannotSave is raised. In any case the older checkpoints are as they were and nothing half-written is left.
    """
    for pause in (*PAUSES_SECONDS, None):
        try:
            target = _commit(folder, step, fill, facts)
            break
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if pause is None:
                raise CannotSave(
                    f"the checkpoint of step {step} cannot be written to {folder} ({reason}): the ones before it are as they were; "
                    "make room there, then run the same command to go on"
                ) from error
            log.warning("the checkpoint of step %d cannot be written to %s (%s): trying again in %g s", step, folder, reason, pause)
            time.sleep(pause)
    older = [s for s in steps(folder) if s <= step]
    for old in older[:-keep]:
        if not keep_every or old % keep_every:
            shutil.rmtree(path_of(folder, old), ignore_errors=True)
    return target


def _commit(folder: Path, step: int, fill: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target = path_of(folder, step)
    temporary, replaced = (folder / f"{target.name}.tmp-{secrets.token_hex(4)}" for _ in range(2))
    try:
        temporary.mkdir()
        fill(temporary)
        _seal(temporary, step, facts)
        if target.exists():  # an unreadable one of the same step: it was already passed over when resuming
            target.rename(replaced)
        temporary.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def _seal(folder: Path, step: int, facts: Mapping[str, Any]) -> None:
    """Syncs every file in the folder and writes their sums, and the sum of that, to the manifest."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        _sync(file)
    sums = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    manifest = folder / MANIFEST
    manifest.write_text(_sealed({"step": step, **facts, "files": sums}))
    _sync(manifest)
    for inner in {p.parent for p in files} | {folder}:
        _sync(inner)


def _sealed(body: Mapping[str, Any]) -> str:
    """The manifest's text; its last entry is the sum of the rest, so that no byte of it can change unnoticed."""
    return json.dumps({**body, "seal": hashlib.sha256(json.dumps(body).encode()).hexdigest()}, indent=1)


def manifest(path: Path) -> dict[str, Any]:
    """What the manifest of a checkpoint folder says. Raises ValueError where it is damaged, OSError where it cannot be read."""
    text = (path / MANIFEST).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    body = {k: v for k, v in content.items() if k != "seal"}
    if text != _sealed(body):
        raise ValueError("its seal is broken")
    return body


def load(path: Path) -> tuple[Stored, dict[str, Any]]:
    """(tensors, scalars) of a checkpoint folder that `verify` finds nothing wrong with."""
    return Stored(path), json.loads((path / SCALARS).read_text())


def load_newest(folder: Path) -> tuple[Path, Stored, dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as its manifest says: (path, tensors, scalars); None where there is none.

    Damaged ones are named in the log and passed over.
    """
    path = newest(folder)
    return None if path is None else (path, *load(path))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint folder that verifies, or None; damaged ones are named in the log."""
    for step in reversed(steps(folder)):
        path = path_of(folder, step)
        problem = verify(path)
        if problem is None:
            return path
        log.warning("checkpoint %s is passed over: %s", path, problem)
    return None


def sweep(folder: Path) -> None:
    """Removes the temporary folders that killed saves left behind; for the one process that holds the run folder."""
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Nothing in it is deserialised but the manifest's JSON."""
    try:
        files = manifest(path)["files"]
        for name, expected in files.items():
            size = (path / name).stat().st_size
            if size != expected["size"]:
                return f"{name} is {size} bytes long, not {expected['size']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} does not have the hash in the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its manifest cannot be read: {error}" if not isinstance(error, OSError) else f"it cannot be read: {error}"
    return None


def steps(folder: Path) -> list[int]:
    """The steps of all checkpoints with a manifest, damaged or not, oldest first."""
    names = (re.fullmatch(r"step-(\d+)", p.name) for p in folder.glob("step-*") if (p / MANIFEST).is_file())
    return sorted(int(name[1]) for name in names if name)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def weights_of(path: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint folder: the average where one was kept. For use without the optimizer."""
    tensors = Stored(path)
    return {**part(tensors, "model"), **part(tensors, "average")}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
