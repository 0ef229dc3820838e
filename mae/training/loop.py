"""The training loop, for pretraining, probing and fine-tuning alike: read it from top to bottom."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.config import Config
from mae.data.loader import Batch
from mae.errors import NonFiniteLoss, Preempted
from mae.methods.base import Output
from mae.nets import keyed
from mae.training import distributed, optim
from mae.training.distributed import Ranks
from mae.training.optim import Average
from mae.training.schedule import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint."""

    step: int = 0  # optimiser steps taken
    seconds: float = 0.0  # spent training, without evaluation
    replaced: int = 0  # damaged images that this rank replaced


@dataclass(frozen=True)
class Hooks:
    """What the loop calls back; every rank calls them at the same steps."""

    log: Callable[[dict[str, Any]], None]  # a row of metrics.jsonl
    save: Callable[[Progress], None]
    evaluate: Callable[[int], None]
    picture: Callable[[int], None]
    stop: Callable[[], bool]  # whether this process was told to stop


def fit(
    module: nn.Module,
    forward: Callable[[nn.Module, Batch], Output],
    batches: Iterator[list[Batch]],
    *,
    optimizer: Optimizer,
    average: Average | None,
    scaler: torch.amp.GradScaler,
    plan: Plan,
    progress: Progress,
    config: Config,
    precision: str,
    ranks: Ranks,
    hooks: Hooks,
) -> None:
    """Trains until the plan is done. `module` may be wrapped for data parallelism; `batches` start at progress.step.

    Raises NonFiniteLoss before an update that would spoil the weights (on CUDA the updates from the bad one on are skipped on
    the device and it is raised at the next logged step), Preempted after saving when told to stop.
    """
    train = config.train
    parameters = [p for p in module.parameters() if p.requires_grad]
    autocast = torch.autocast(ranks.device.type, DTYPES[precision]) if precision != "fp32" else contextlib.nullcontext()
    spoilt = torch.zeros((), device=ranks.device)  # 1 from the first non-finite step on
    on_device = ranks.device.type == "cuda" and precision != "fp16" and optim.skips_on_device(optimizer)
    if on_device:
        optimizer.found_inf = spoilt  # type: ignore[attr-defined]
    pace = _Pace()

    while (done := plan.done(progress.step, distributed.from_first(progress.seconds, ranks) if plan.seconds else 0)) < 1:
        began = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - began
        lr = plan.learning_rate(done)
        optim.set_learning_rate(optimizer, lr)

        total: dict[str, Tensor] = {}
        for i, batch in enumerate(micro_batches):
            with distributed.accumulating(module, i + 1 < len(micro_batches)):
                with autocast:
                    output = forward(module, batch)
                scaler.scale(output.loss / len(micro_batches)).backward()
            total = _add(total, output, len(micro_batches))
            progress.replaced += batch.replaced

        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if config.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip, norm)
        # gradients are the same on every rank, so that all agree; under fp16 an overflow is the scaler's business
        watched = total["loss"] if precision == "fp16" else norm + 0 * total["loss"]
        spoilt.copy_(torch.maximum(spoilt, (~torch.isfinite(watched)).float()))
        if not on_device and distributed.any_rank(bool(spoilt), ranks):
            raise NonFiniteLoss(_non_finite(progress.step, lr))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if average is not None:
            average.update()

        progress.step += 1
        pace.step(time.perf_counter() - began, waited)
        progress.seconds += time.perf_counter() - began
        if progress.step % train.log_every == 0:
            row = _row(progress, plan, total, norm, lr, micro_batches, ranks) | pace.row(plan.batch_size)
            if distributed.any_rank(bool(spoilt), ranks):
                raise NonFiniteLoss(_non_finite(progress.step - 1, lr))
            hooks.log(row)
        if train.evaluate_every and progress.step % train.evaluate_every == 0:
            hooks.evaluate(progress.step)
        if config.track.images_every and progress.step % config.track.images_every == 0:
            hooks.picture(progress.step)
        resumed = time.perf_counter()
        stop = distributed.any_rank(hooks.stop(), ranks)
        if stop or progress.step % train.checkpoint_every == 0:
            if distributed.any_rank(bool(spoilt), ranks):
                raise NonFiniteLoss(_non_finite(progress.step - 1, lr))
            hooks.save(progress)
        progress.seconds += time.perf_counter() - resumed  # saving is part of a wall-clock budget, evaluation and pictures are not
        if stop:
            raise Preempted(f"stopped by a signal after step {progress.step}, saved: run the same command to go on")


def _add(total: dict[str, Tensor], output: Output, parts: int) -> dict[str, Tensor]:
    values = {"loss": output.loss.detach(), **output.metrics}
    return {k: total.get(k, 0) + v.float() / parts for k, v in values.items()}


def _row(
    progress: Progress, plan: Plan, total: dict[str, Tensor], norm: Tensor, lr: float, micro_batches: list[Batch], ranks: Ranks
) -> dict[str, Any]:
    """The figures of the step just taken; losses are means over ranks. The only place where the host waits for the device."""
    values = distributed.mean(torch.stack([v.float() for v in total.values()]), ranks).tolist()
    figures = dict(zip(total, values, strict=True))
    mixed = torch.cat([keyed.bits(b.keys, 1, "order")[:, 0] for b in micro_batches]).sum()  # a sum has no order
    batch_hash = int(distributed.total(mixed, ranks)) & (1 << 64) - 1
    replaced = int(distributed.total(torch.tensor(progress.replaced, device=ranks.device), ranks))
    samples = progress.step * plan.batch_size
    return {
        "step": progress.step,
        "samples": samples,
        "epoch": progress.step / plan.steps_per_epoch,
        "loss": figures.pop("loss"),
        "lr": lr,
        "grad_norm": float(norm),
        **figures,
        "replaced": replaced,
        "batch_hash": f"{batch_hash:016x}",
    }


class _Pace:
    """Images a second and the share of the time spent waiting for data, since the last row."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def step(self, seconds: float, waited: float) -> None:
        self.steps, self.seconds, self.waited = self.steps + 1, self.seconds + seconds, self.waited + waited

    def row(self, batch_size: int) -> dict[str, float]:
        row = {"images_per_second": self.steps * batch_size / self.seconds, "data_wait": self.waited / self.seconds}
        self.__init__()  # type: ignore[misc]
        return row


def _non_finite(step: int, lr: float) -> str:
    return (
        f"the loss or its gradient is not finite at step {step} (learning rate {lr:.3g}); no weight was touched by it: "
        "try a lower optim.base_lr, optim.clip=1, or train.precision=fp32"
    )
