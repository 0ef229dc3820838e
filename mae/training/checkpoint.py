"""Atomic, verified, pickle-free checkpoints: a folder of safetensors and JSON, sealed by a manifest of SHA-256 sums.

A checkpoint is written under a temporary name, synced, sealed and renamed; what has no valid manifest does not count. Tensors
go to safetensors and scalars to JSON, so that loading one never executes code. Hashes give integrity, not authenticity.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mae.training.state import part

log = logging.getLogger("mae")
TENSORS, SCALARS, MANIFEST = "state.safetensors", "state.json", "manifest.json"


def save(folder: Path, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], *, facts: dict[str, Any], keep: int) -> Path:
    """Commits folder/step-NNNNNNNN and then prunes all but the newest `keep`. `facts` go into the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:08d}"
    temporary = folder / f"{target.name}.tmp-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary / TENSORS)
        (temporary / SCALARS).write_text(json.dumps(scalars, indent=1))
        files = {name: {"size": (temporary / name).stat().st_size, "sha256": _sha256(temporary / name)} for name in (TENSORS, SCALARS)}
        (temporary / MANIFEST).write_text(json.dumps({"step": step, **facts, "files": files}, indent=1))
        for name in (*files, MANIFEST):
            _sync(temporary / name)
        _sync(temporary)
        if target.exists():  # an unreadable one of the same step: it was already passed over when resuming
            target.rename(folder / f"{target.name}.tmp-{secrets.token_hex(4)}")
        temporary.rename(target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_newest(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint whose every byte is as its manifest says: (path, tensors, scalars); None where there is none.

    Damaged ones are named in the log and passed over.
    """
    for path in reversed(_complete(folder)):
        problem = verify(path)
        if problem is None:
            return path, load_file(path / TENSORS), json.loads((path / SCALARS).read_text())
        log.warning("checkpoint %s is passed over: %s", path, problem)
    return None


def sweep(folder: Path) -> None:
    """Removes the temporary folders that killed saves left behind; for the one process that holds the run folder."""
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} is {(path / name).stat().st_size} bytes long, not {expected['size']}"
            if _sha256(path / name) != expected["sha256"]:
                return f"{name} does not have the hash in the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read: {error}"
    return None


def _complete(folder: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first (by the step in the name)."""
    return sorted(p for p in folder.glob("step-*") if ".tmp-" not in p.name and (p / MANIFEST).is_file())


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_of(path: Path) -> dict[str, Tensor]:
    """The model's weights in a checkpoint folder: the average where one was kept. For use without the optimizer."""
    tensors = load_file(path / TENSORS)
    return {**part(tensors, "model"), **part(tensors, "average")}


def newest(folder: Path) -> Path | None:
    """The newest checkpoint folder that verifies, or None."""
    return next((p for p in reversed(_complete(folder)) if verify(p) is None), None)
