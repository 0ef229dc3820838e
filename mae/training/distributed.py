"""Everything that knows about ranks: starting them, agreeing, averaging."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mae.errors import ConfigError, LostContact
from mae.training.rendezvous import fresh_store


class Ranks(NamedTuple):
    """Who this process is among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0


@contextlib.contextmanager
def start(device: str, timeout: float = 10.0) -> Iterator[Ranks]:
    """Joins the process group that torchrun describes in the environment (NCCL for CUDA, gloo for CPU), and leaves it at the end.

    `device` is auto, cpu, cuda or cuda:N; ranks wait `timeout` minutes for one another. Inside another `start` it is that one's group,
    which stays: torchrun's store serves only one. Raises ConfigError for a device that is not there, LostContact where another rank
    fell silent.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    chosen = device_of(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    torch.set_flush_denormal(True)  # denormal weights slow CPU kernels down many times
    try:
        if world == 1 or dist.is_initialized():
            yield Ranks(dist.get_rank() if world > 1 else 0, world, chosen)
            return
        # gloo beside NCCL: flags and scalars are agreed on by the CPU, without a stop of the device
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        with _in_contact(timeout):
            patience = timedelta(minutes=timeout)
            store, rank, world = fresh_store(patience)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
            yield Ranks(dist.get_rank(), world, chosen)
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def _in_contact(timeout: float) -> Iterator[None]:
    """Leaves the process group at the end; turns what the backends say of a silent or dead rank into one sentence."""
    try:
        yield
    except RuntimeError as error:
        # gloo raises bare RuntimeErrors that open with the place in its own sources
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            _leave()
            raise
        # the group is not left: taking leave of ranks that do not answer would be waiting again
        raise LostContact(
            f"rank {os.environ.get('RANK', 0)} on {socket.gethostname()} lost contact with the others: one of them died, or did not answer "
            f"for train.timeout = {timeout:g} minutes; look at their messages and at the network, then run the same command to go on"
        ) from error
    except BaseException:
        _leave()
        raise
    else:
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def device_of(name: str, local_rank: int = 0) -> torch.device:
    """The device that train.device names, for a process of that rank on its host. Raises ConfigError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"train.device {name!r} is unknown: choose auto, cpu or cuda") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("train.device is cuda, but torch finds no CUDA device here: choose train.device=cpu or auto")
        return torch.device("cuda", local_rank if device.index is None else device.index)
    return device


def mean(values: Tensor, ranks: Ranks) -> Tensor:
    """Element-wise mean over ranks of a small float tensor."""
    if ranks.world > 1:
        dist.all_reduce(values)
        values = values / ranks.world
    return values


def total(values: Tensor, ranks: Ranks) -> Tensor:
    """Element-wise sum over ranks; integers wrap around."""
    if ranks.world > 1:
        dist.all_reduce(values)
    return values


def largest(values: Tensor, ranks: Ranks) -> Tensor:
    """Element-wise maximum over ranks; between GPUs without waiting for it."""
    if ranks.world > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def join(rows: Tensor, ranks: Ranks) -> Tensor:
    """The rows (N, ...) of all ranks one below the other, on the CPU; ranks may have different numbers of them."""
    if ranks.world == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks.world)]
    dist.all_gather(counts, torch.tensor([len(rows)]))
    most = max(int(count) for count in counts)
    mine = torch.cat([rows, rows.new_zeros(most - len(rows), *rows.shape[1:])]).contiguous()
    whole = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(whole, mine)
    return torch.cat([part[: int(count)] for part, count in zip(whole, counts, strict=True)])


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """Whether the flag is set on at least one rank; every rank gets the same answer."""
    if ranks.world == 1:
        return flag
    tensor = torch.tensor(int(flag))
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return bool(tensor)


def from_first(value: float, ranks: Ranks) -> float:
    """Rank 0's value, on every rank."""
    if ranks.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


def first_does(action: Callable[[], object], ranks: Ranks) -> None:
    """Rank 0 does it while the others wait; where it fails, every rank raises."""
    error: Exception | None = None
    if ranks.first:
        try:
            action()
        except Exception as failure:
            error = failure
    if any_rank(error is not None, ranks):
        raise error or ConfigError("rank 0 gave up: its message says why")
