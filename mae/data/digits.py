"""Handwritten digits that ship inside scikit-learn: 1,797 grey images of 8 x 8 (UCI, Alpaydin & Kaynak), ten classes."""

import importlib.util
from pathlib import Path

import numpy as np

from mae.data.sources import Opened, Subset, fingerprint, position_hashes, share_of
from mae.keys import Data


class Digits:
    """All 1,797 digits."""

    classes = tuple("0123456789")

    def __init__(self, channels: int) -> None:
        table = _table().astype(np.int64)
        grey = (table[:, :64].reshape(-1, 8, 8) * 255 + 8) // 16  # 0..16 -> 0..255, rounded
        self.images = np.repeat(grey.astype(np.uint8)[..., None], channels, axis=-1)  # (N, 8, 8, C)
        self.labels = table[:, 64]
        self.fingerprint = fingerprint(grey.astype(np.uint8), self.labels)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def name_of(self, index: int) -> str:
        return f"digit {index}"


def _table() -> np.ndarray:
    """(N, 65): a row's 64 pixels and its label. Read from scikit-learn's file: to import it takes ten times as long."""
    package = importlib.util.find_spec("sklearn")
    file = Path(package.origin).parent / "datasets/data/digits.csv.gz" if package is not None and package.origin else None
    if file is not None and file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.column_stack([data.data, data.target])


def open_digits(data: Data) -> Opened:
    """Two thirds for training and a third for testing, the same share of every class, fixed by `data.split_seed`."""
    digits = Digits(data.channels)
    hashes = position_hashes(len(digits), data.split_seed + 1)  # + 1: validation is drawn by split_seed itself
    test = np.zeros(len(digits), bool)
    for label in range(10):
        members = np.flatnonzero(digits.labels == label)
        test[members] = share_of(hashes[members], 1 / 3)
    return Opened(train=Subset(digits, ~test), test=Subset(digits, test))
