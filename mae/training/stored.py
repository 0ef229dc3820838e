"""Named tensors in safetensors files: one file where rank 0 has them whole, or one a rank where each has its rows (FSDP).

In `state-00001-of-00004.safetensors` lie rank 1's rows of every tensor; the rows of all files in their order are the tensor, so that any
number of ranks, and a single process, reads what any other number wrote, and each only the rows that it needs. torch's own checkpoints
would bring a pickled index (torch.distributed.checkpoint's .metadata), which these do not need.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from mae.training import distributed
from mae.training.distributed import Ranks

SUFFIX = ".safetensors"


def whole(tensors: Mapping[str, Tensor]) -> bool:
    """Whether one rank has all of the tensors."""
    return not any(isinstance(tensor, DTensor) for tensor in tensors.values())


def write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes whole tensors into the folder, as one file."""
    _write(tensors, folder / f"state{SUFFIX}")


def stage(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks) -> None:
    """Every rank writes its rows of the tensors into the folder, which rank 0 empties first; rank 0 adds the tensors that are whole.

    The folder must be one that all ranks see. Where one of them cannot write, all raise OSError.
    """
    failure: OSError | SafetensorError | None = None
    with contextlib.suppress(OSError):  # what is wrong with the folder is said by the writing that follows
        if ranks.first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    distributed.any_rank(False, ranks)  # the folder is there
    mine = {name: tensor.to_local() for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    mine = {name: rows for name, rows in mine.items() if rows.numel()}
    if ranks.first:
        mine |= {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    file = folder / _share(ranks.rank, ranks.world)
    try:
        folder.mkdir(exist_ok=True)  # asks the file system itself whether it is there
        _write(mine, file)
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())  # here, on the host that wrote it
    except (OSError, SafetensorError) as error:
        failure = error
    if distributed.any_rank(failure is not None, ranks):
        raise OSError(f"a rank cannot write its share of the checkpoint to {folder}: {failure or 'its message says why'}") from failure


def adopt(staged: Path, folder: Path) -> None:
    """Takes the files of a staged folder into another one, without copying them where the file system allows it.

    Raises OSError where one of them is missing: a network file system may be late to show what another host wrote.
    """
    world = int(next(staged.glob(f"*{SUFFIX}")).stem.rpartition("-")[2])
    for rank in range(world):  # by name: a listing may be older than the files
        name = _share(rank, world)
        try:
            os.link(staged / name, folder / name)
        except OSError:
            shutil.copyfile(staged / name, folder / name)


def _share(rank: int, world: int) -> str:
    return f"state-{rank:05d}-of-{world:05d}{SUFFIX}"


def _write(tensors: Mapping[str, Tensor], file: Path) -> None:
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, file)


class Stored(Mapping[str, Tensor]):
    """The tensors of a folder that `write` filled, read from disk when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._holders: dict[str, list] = {}  # of each name the files with some of its rows, which stay open as long as this object lives
        for path in sorted(folder.glob(f"state*{SUFFIX}")):
            file = safe_open(path, framework="pt")
            for name in file.keys():  # noqa: SIM118
                self._holders.setdefault(name, []).append(file)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor, on the CPU."""
        parts = [file.get_tensor(name) for file in self._holders[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._holders)

    def __len__(self) -> int:
        return len(self._holders)

    def dimensions(self, name: str) -> int:
        """How many a tensor has."""
        return len(self._holders[name][0].get_slice(name).get_shape())

    def rows(self, name: str, start: int, count: int) -> Tensor:
        """`count` rows from `start` on of a tensor with at least one dimension, of which no other rows are read."""
        parts: list[Tensor] = []
        offset = 0
        for file in self._holders[name]:
            lazy = file.get_slice(name)
            length = lazy.get_shape()[0]
            low, high = max(start - offset, 0), min(start + count - offset, length)
            if low < high or not parts:
                parts.append(lazy[min(low, length) : max(min(low, length), high)])
            offset += length
        return torch.cat(parts)


def fill(target: Tensor, stored: Stored, name: str) -> None:
    """Copies a stored tensor into one of the same shape, or its rows into a share of one. Raises ValueError for another shape."""
    if isinstance(target, DTensor):
        local = target.to_local()
        local.copy_(stored.rows(name, first_row(target), len(local)))
        return
    value = stored[name]
    if value.shape != target.shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)} in the checkpoint, not {tuple(target.shape)}")
    target.copy_(value)


def first_row(tensor: DTensor) -> int:
    """Where this rank's rows of a tensor begin that is cut as by torch.chunk along its first dimension (FSDP2's way)."""
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(f"expected rows of a tensor on each rank, found {tensor.placements}")
    size = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(size * tensor.device_mesh.get_local_rank(), tensor.shape[0])
