"""What commands write: folders that are there as a whole or not at all, files whose place is tried before anything is computed for them."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mae.errors import ConfigError


def check_place(target: Path) -> None:
    """Makes the folder of a file that is to be written. Raises ConfigError where that, or a file in it, cannot be made."""
    trial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"{target} cannot be written ({error.strerror}): choose a place that you may write to") from error


@contextmanager
def whole_or_not(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when all is written, and is gone where that fails."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise ConfigError(f"{target} cannot be made ({error.strerror}): choose a folder that you may write to") from error
    try:
        yield unfinished
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
