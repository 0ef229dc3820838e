"""What is watched while a run trains: updates that would spoil the weights, losses that leap, ranks that drift apart.

Every decision is the same on all ranks, and none of them makes the host wait for a GPU between two logged steps.
"""

import math
import resource
import statistics
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mae.errors import LossSpike, NonFiniteLoss, ReplicasDiffer
from mae.training import distributed
from mae.training.distributed import Ranks
from mae.training.progress import Progress

LATEST, FEWEST, KEPT = 3, 16, 64  # logged losses: that make a spike, that must be known before it, that are kept
SPIKE = 10.0  # robust deviations above the median from where on a run is said to have a spike
MOST_ROLL_BACKS = 3  # to one checkpoint


class Guard:
    """Decides before every update whether it may be made: not where the loss or a gradient on any rank is not finite.

    A forbidden update leaves weights, moments and average as they are, and takes back what the forward pass did to buffers (codebooks,
    running means); its step and its data count as done. After more than `allowed` in a row the run is to end. On CUDA the decision stays
    on the device: the optimizer reads it there (`found_inf`), and the host learns of it at the next `check`, until when nothing more is
    updated.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler, progress: Progress, *, allowed: int, ranks: Ranks
    ) -> None:
        self.scaler, self.progress, self.allowed, self.ranks = scaler, progress, allowed, ranks
        self.on_device = ranks.device.type == "cuda"
        self.forbidden = torch.zeros((), device=ranks.device)  # 1 = the update of this step is not made
        self.counts = torch.tensor([float(progress.skipped), float(progress.skipped_in_a_row)], device=ranks.device)
        self.buffers = {b: (b.clone(), b._version) for b in module.buffers()}  # as they were after the last good step
        if self.on_device:
            optimizer.found_inf = self.forbidden  # type: ignore[attr-defined]  # what fused optimizers look for

    def forbids(self, loss: Tensor, norm: Tensor) -> bool:
        """Judges a step by its loss and its gradients' norm, scalars; where the device knows better than the host, False.

        Raises NonFiniteLoss, on the host, where the run is to end.
        """
        overflow = bad = ~torch.isfinite(norm)
        if self.scaler.is_enabled():  # fp16: a smaller scale is the answer to an overflow, unless it is no overflow
            bad = overflow & (self.scaler.scale(torch.ones_like(norm)) < 1)
        bad = bad | ~torch.isfinite(loss)
        bad, overflow = distributed.largest(torch.stack([bad, bad | overflow]).float(), self.ranks)
        bad = torch.maximum(bad, (self.counts[1] > self.allowed).float())  # the end is final
        self.counts[0] += bad
        self.counts[1] = (self.counts[1] + 1) * bad
        self.forbidden.copy_(torch.maximum(bad, overflow))
        self._settle_buffers()
        if self.on_device:
            return False
        self.check(self.progress.step + 1)
        return bool(self.forbidden)

    @torch.no_grad()
    def _settle_buffers(self) -> None:
        """Those that the forward pass wrote to: back to what they were, or kept as they are now."""
        for buffer, (kept, version) in self.buffers.items():
            if buffer._version != version:
                kept.copy_(torch.where(self.forbidden.bool(), kept, buffer))
                buffer.copy_(kept)
                self.buffers[buffer] = (kept, buffer._version)

    def made(self) -> Tensor | None:
        """1 where the device made this step's update, 0 where not; None where the host knows that it was made."""
        return 1 - self.forbidden if self.on_device else None

    def check(self, steps: int) -> None:
        """Brings `progress` up to date after so many steps; waits for the device. Raises NonFiniteLoss where the run is to end."""
        skipped, in_a_row = (int(count) for count in self.counts.tolist())
        self.progress.skipped, self.progress.skipped_in_a_row = skipped, in_a_row
        if in_a_row > self.allowed:
            first = steps - in_a_row
            times = f"at {in_a_row} steps in a row from step {first} on" if self.allowed else f"at step {first}"
            raise NonFiniteLoss(
                f"the loss or its gradient is not finite {times}; no weight was touched by it: "
                "try a lower optim.base_lr, optim.clip=1, or train.precision=fp32"
            )


def note_loss(progress: Progress, loss: float) -> float:
    """Keeps a logged loss and says how far the latest ones are above those before, in robust standard deviations; 0 where they are not.

    It is the smallest excess of the latest three over the median of the up to 61 before them, in units of 1.4826 x the median absolute
    deviation (Hampel, 1974), at least 1% of the median: one bad batch is no spike, and neither is a loss that hardly moves at all.
    """
    if math.isfinite(loss):
        progress.losses = [*progress.losses, loss][-KEPT:]
    before, latest = progress.losses[:-LATEST], progress.losses[-LATEST:]
    if len(before) < FEWEST:
        return 0.0
    middle = statistics.median(before)
    deviation = max(1.4826 * statistics.median(abs(x - middle) for x in before), 0.01 * abs(middle), 1e-12)
    return max((min(latest) - middle) / deviation, 0.0)


def spike(step: int, row: Mapping[str, Any], log_every: int) -> LossSpike:
    """What a row is answered with whose loss_excess is above train.spike."""
    calm_until = step - LATEST * log_every
    return LossSpike(
        f"the loss leapt after step {calm_until} and is {row['loss']:.4g} at step {step}, at least {row['loss_excess']:.1f} robust "
        "deviations above what it was",
        calm_until=calm_until,
    )


def beyond_help(spike: LossSpike) -> LossSpike:
    """What is said when going back has not helped."""
    words = f"{spike}, and going back {MOST_ROLL_BACKS} times has not helped: try a lower optim.base_lr or optim.clip=1"
    return LossSpike(words, calm_until=spike.calm_until)


def costs(row: Mapping[str, Any], derived: Mapping[str, Any], ranks: Ranks) -> dict[str, float]:
    """What the first rank's memory and its processor's time give: `memory_gib` and, where FLOPs are known, `mfu`.

    Model FLOPs utilisation, Chowdhery et al., PaLM, arXiv:2204.02311, appendix B: the FLOPs that the model needs for the images a second it
    has seen, over what the device can do; here that is not a data sheet's figure but what a large matrix product reaches on it.
    """
    found = {"memory_gib": memory_gib(ranks.device)}
    if derived.get("flops_per_image"):
        found["mfu"] = row["images_per_second"] / ranks.world * derived["flops_per_image"] / derived["device_flops"]
    return found


def memory_gib(device: torch.device) -> float:
    """Peak memory so far: of a GPU's tensors, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def compare_replicas(module: nn.Module, ranks: Ranks) -> None:
    """Raises ReplicasDiffer where the ranks' copies of the parameters are not the same to the bit. Sharded parameters have no copies."""
    copies = {name: p for name, p in module.named_parameters() if not isinstance(p, DTensor)}
    if ranks.world == 1 or not copies:
        return
    mine = torch.stack([_checksum(p.detach()) for p in copies.values()])[None].cpu()
    sums = distributed.join(mine, ranks)  # (ranks, parameters)
    if (sums == sums[0]).all():
        return
    common = Counter(map(tuple, sums.tolist())).most_common(1)[0][0]
    odd = [rank for rank, row in enumerate(sums.tolist()) if tuple(row) != common]
    first = list(copies)[int((sums != sums[0]).any(0).nonzero()[0])]
    who = f"rank {odd[0]} holds" if len(odd) == 1 else f"ranks {', '.join(map(str, odd))} hold"
    raise ReplicasDiffer(
        f"{who} other weights than the other ranks (first in {first}): a GPU or its memory is at fault, or code that is not the same on "
        "all ranks; nothing of it was saved: look at those machines, then run the same command to go on from the last checkpoint"
    )


def _checksum(values: Tensor) -> Tensor:
    """An int64 of the bit pattern: sum of word x position modulo 2^64, so that any one word that differs changes it."""
    words = values.contiguous().view(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).long()
    return (words * torch.arange(1, len(words) + 1, device=words.device)).sum()
