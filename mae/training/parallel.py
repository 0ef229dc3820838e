"""How a module is trained on several ranks: whole copies (DistributedDataParallel) or shares of one (FSDP2).

FSDP2: Zhao et al., arXiv:2304.11277, as torch's `fully_shard`, one group of parameters a block. Shares, gradients and what is gathered are
float32, and autocast computes in half precision as it does on one rank, so that all three ways compute the same: gathering in half
precision (MixedPrecisionPolicy) would save half of the traffic, but norms, biases and tokens would then be rounded under FSDP alone.
"""

import contextlib
import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mae.errors import ConfigError
from mae.keys import Optim
from mae.training import blocks, distributed
from mae.training.distributed import Ranks
from mae.training.estimate import state_bytes

SHARE = 0.5  # of a rank's memory that the training state may take before it is sharded; activations need the rest
MOMENTS = {"adamw": 2, "muon": 2, "lars": 1, "sgd": 1}  # numbers that an optimizer keeps a parameter, at most
WHOLE = ("muon", "lars")  # optimizers that look at whole matrices
BUFFERS_STAY: dict[str, Any] = (  # they are alike on all ranks and need not be sent; the older word is deprecated since torch 2.13
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


class Engine(NamedTuple):
    """What carries the gradients between ranks, and why that."""

    name: str  # plain | ddp | fsdp
    reason: str


def choose(wanted: str, module: nn.Module, optim: Optim, *, average: bool, ranks: Ranks) -> Engine:
    """The engine for a module that is not wrapped yet. Every rank calls it and gets the same one. Raises as `decide` does."""
    least = -distributed.largest(torch.tensor(-memory(ranks.device), dtype=torch.float64), ranks)
    return decide(wanted, module, optim, average=average, world=ranks.world, there=float(least))


def decide(wanted: str, module: nn.Module, optim: Optim, *, average: bool, world: int, there: float) -> Engine:
    """The engine of `world` ranks of `there` bytes each; `auto` shards what would fill more than half of a rank's memory.

    Raises ConfigError where fsdp is wanted and the optimizer or the module does not allow it.
    """
    whole = _must_stay_whole(module, optim)
    if wanted == "fsdp" and whole:
        raise ConfigError(f"train.parallel=fsdp cuts parameters up, but {whole}: choose train.parallel=ddp")
    if world == 1:
        return Engine("plain", "one rank")
    if wanted != "auto":
        return Engine(wanted, "as told")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in module.parameters())
    needed = state_bytes(parameters, trained=trained, moments=MOMENTS[optim.name], average=average)
    small = needed <= SHARE * there
    size = (
        f"weights, gradients and moments take {needed / 2**30:.3g} GiB, {'less' if small else 'more'} than half of {there / 2**30:.3g} GiB"
    )
    if small or whole:
        return Engine("ddp", size if small else f"{size}, but {whole}")
    return Engine("fsdp", size)


def _must_stay_whole(module: nn.Module, optim: Optim) -> str | None:
    if optim.name in WHOLE:
        return f"optim.name={optim.name} needs whole matrices"
    if getattr(module, "writes_parameters", False) or getattr(module, "differentiates", False):
        return "this method with these settings writes to its parameters or differentiates twice"
    scalar = next((name for name, p in module.named_parameters() if p.ndim == 0), None)
    return f"{scalar} is a single number" if scalar else None


def memory(device: torch.device) -> int:
    """Bytes that one rank has: its GPU's, or its part of the host's among the ranks there."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Spread:
    """A module as it is trained under an engine. `module` has the parameters to optimise and to save, under the names that it always has.

    Under FSDP they are shares from then on (in place), and rank 0 keeps a plain copy on the CPU for what needs the whole module.
    """

    def __init__(self, engine: str, module: nn.Module, ranks: Ranks) -> None:
        self.engine, self.module, self.ranks = engine, module, ranks
        self._plain = copy.deepcopy(module) if engine == "fsdp" and ranks.first else None
        if engine == "fsdp":
            mesh = init_device_mesh(ranks.device.type, (ranks.world,))
            for part in (*blocks.of(module), module):
                fully_shard(part, mesh=mesh)  # moves its part to the device
        else:
            module.to(ranks.device)

    def release(self) -> nn.Module:
        """The module for what comes after training, as it was built: with all its weights on rank 0, without recomputation."""
        with self.whole() as found:
            module = self.module if found is None else found
        for block in blocks.of(module):
            block.__dict__.pop("forward", None)
        return module.eval().to(self.ranks.device) if self.ranks.first else module

    def compile(self) -> None:
        """torch.compile: block by block on a GPU and where parameters are gathered between blocks, else the whole module."""
        blocks.compile_parts(self.module, by_block=self.engine == "fsdp" or self.ranks.device.type == "cuda")

    def wrapped(self) -> nn.Module:
        """What to call in training: gradients are averaged over ranks in its backward pass."""
        if self.engine != "ddp":
            return self.module
        devices = [self.ranks.device] if self.ranks.device.type == "cuda" else None
        # the patch embedding's gradient, some kilobytes, comes with its numbers in another order than DDP's buckets have
        warnings.filterwarnings("ignore", "Grad strides do not match", UserWarning)
        return DistributedDataParallel(self.module, device_ids=devices, gradient_as_bucket_view=True, **BUFFERS_STAY)

    def settle(self, loss: Callable[[], Tensor]) -> None:
        """Before the state of an earlier process is restored: fixes the order in which gradients are summed, by one backward pass in vain.

        DistributedDataParallel lays its buckets out anew after its first backward pass, in the order in which gradients came, and from
        three ranks on another layout is another order of summation: a resumed run must begin with the one that the run before it had.
        """
        if self.engine == "ddp" and self.ranks.world > 2:
            loss().backward()
            self.module.zero_grad(set_to_none=True)

    @contextlib.contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        """The module with all its weights, in eval mode, on rank 0; None elsewhere. Every rank calls it, and waits at its end for none."""
        if self.engine == "fsdp":
            weights = get_model_state_dict(self.module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if self._plain is None:
                yield None
                return
            self._plain.load_state_dict(weights)
            try:
                yield self._plain.eval().to(self.ranks.device)
            finally:
                self._plain.cpu()
            return
        training = self.module.training
        try:
            yield self.module.eval() if self.ranks.first else None
        finally:
            self.module.train(training)


def accumulating(module: nn.Module, more_to_come: bool) -> contextlib.AbstractContextManager[None]:
    """While accumulating, gradients are averaged over ranks with the last micro-batch only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(not more_to_come)
    return module.no_sync() if more_to_come and isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def total_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar that is the same on every rank."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
