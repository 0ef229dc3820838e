"""Images that the `datasets` library of Hugging Face finds: by name on its hub, or in a folder; Arrow and Parquet files, or images.

The library finds, brings and keeps the files (in its own cache, HF_HOME); the images in them are decoded here, so that every kind of image
becomes what it becomes anywhere else. No code of a data set is run.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from mae.data.decode import DamagedImage, decode
from mae.data.sources import Opened, Subset, fingerprint, is_url, position_hashes, share_of
from mae.errors import ConfigError
from mae.keys import Data

HELD_OUT = ("test", "validation", "val", "valid")  # in this order: the first with labels is the test split
TEST_SHARE = 0.2  # where there is none
LABELS = ("label", "labels", "fine_label")  # of several columns of classes the first of these, else the first


class Rows:
    """The rows of one split."""

    def __init__(self, rows: Any, name: str, image: str, label: str | None, channels: int) -> None:
        """`rows`: a datasets.Dataset whose column `image` is not decoded; `label`: its column of classes, -1 where it is not told.

        Raises ConfigError where only some rows have a label.
        """
        self.rows, self.name, self.image, self.channels = rows, name, image, channels
        labels: np.ndarray = np.zeros(0) if label is None else np.array(rows.with_format("numpy")[label][:], np.int64)
        if 0 < np.count_nonzero(labels < 0) < len(labels):
            raise ConfigError(f"{self.name_of(int(labels.argmin()))} has no label but others have one: choose another data set")
        told = label is not None and labels.min(initial=0) >= 0
        self.labels: np.ndarray | None = labels if told else None
        self.classes: tuple[str, ...] | None = tuple(rows.features[label].names) if told else None
        self.fingerprint = fingerprint(name, _sizes(rows, image), labels)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> np.ndarray:
        """The image as (H, W, C) uint8. Raises DamagedImage."""
        return decode(self.content(index), channels=self.channels, name=self.name_of(index))

    def content(self, index: int) -> bytes:
        """The image's file as it was stored. Raises DamagedImage where it cannot be read."""
        stored = self.rows[index][self.image] or {}
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        try:
            return Path(stored["path"]).read_bytes()
        except (OSError, KeyError, TypeError) as error:
            raise DamagedImage(self.name_of(index), "it holds no image, nor a file that is here") from error

    def name_of(self, index: int) -> str:
        return f"{self.name} row {index}"


def open_hf(data: Data) -> Opened:
    """What `data.path` names: a data set on the hub, a folder that datasets.save_to_disk wrote, or one of Parquet files or images.

    Its test split (else its validation) is for testing, validation beside a test for validation, train for training; held-out splits whose
    labels are missing where train has some are passed over. Without one a fixed fifth is for testing. Raises ConfigError where the library
    is missing, for what it cannot find or bring, and for data without images.
    """
    if not data.path:
        raise ConfigError("data.path is missing: say which data set with data.path=NAME, as on huggingface.co, or data.path=FOLDER")
    if is_url(data.path):
        raise ConfigError("data.name=hf takes a name on the hub or a folder, no URL: write data.path=OWNER/NAME")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError("data.name=hf reads with the library `datasets`, which is not installed: pip install datasets") from error
    splits = _load(datasets, data.path)
    if "train" not in splits and len(splits) > 1:
        raise ConfigError(f"{data.path} has no split train but {', '.join(sorted(splits))}: choose another data set")
    everything = splits["train"] if "train" in splits else next(iter(splits.values()))
    image, label = _columns(datasets, everything, data.path)

    def source(name: str) -> Rows:
        """One split."""
        rows = splits[name].cast_column(image, datasets.Image(decode=False))
        return Rows(rows, name, image, label if label in rows.features else None, data.channels)

    train = source("train" if "train" in splits else next(iter(splits)))
    held = [rows for name in HELD_OUT if name in splits for rows in [source(name)] if _told(rows, train)]
    if held:
        return Opened(train=train, test=held[0], validation=held[1] if len(held) > 1 else None)
    if len(train) < 3:
        raise ConfigError(f"{data.path} holds too few images, {len(train)}: at least 3 are needed, to train, to validate and to test")
    test = share_of(position_hashes(len(train), data.split_seed + 1), TEST_SHARE)  # + 1: validation is drawn by split_seed itself
    return Opened(train=Subset(train, ~test), test=Subset(train, test))


def _load(datasets: Any, path: str) -> dict[str, Any]:
    """The splits by name."""
    folder = Path(path).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else path)
    except Exception as error:  # the library, its hub client and its readers raise dozens of kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        where = "check the folder" if folder.is_dir() else "check the name and the connection, or give a folder that holds it"
        raise ConfigError(f"data.path {path} cannot be opened by the library `datasets` ({reason}): {where}") from error
    return dict(found) if hasattr(found, "keys") else {"train": found}


def _columns(datasets: Any, rows: Any, path: str) -> tuple[str, str | None]:
    """The columns of images and of classes."""
    images = [name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    if not images:
        raise ConfigError(f"{path} has no column of images, only {', '.join(rows.features)}: choose a data set of images")
    classes = [name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    preferred = [name for name in LABELS if name in classes] or classes
    return images[0], preferred[0] if preferred else None


def _told(rows: Rows, train: Rows) -> bool:
    """Whether the rows are labelled where those of train are: hubs hide a test's labels as -1."""
    return len(rows) > 0 and (train.labels is None or rows.labels is not None)


def _sizes(rows: Any, image: str) -> np.ndarray:
    """(N,) int64 bytes of every image, without reading them; -1 where it is a file of its own."""
    compute = importlib.import_module("pyarrow.compute")
    column = rows.data.column(image)
    lengths = compute.binary_length(compute.struct_field(column, "bytes"))
    return compute.fill_null(lengths, -1).to_numpy().astype(np.int64)
