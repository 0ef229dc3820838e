"""The training loop, for pretraining, probing and fine-tuning alike: read it from top to bottom."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mae.config import Config
from mae.data.loader import Batch
from mae.errors import Preempted
from mae.methods.base import Output
from mae.nets import keyed
from mae.nets.precision import computing
from mae.training import distributed, halves, optim, parallel, watch
from mae.training.distributed import Ranks
from mae.training.optim import Average
from mae.training.progress import Progress
from mae.training.schedule import Plan


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
    """Trains until the plan is done. `module` may be wrapped for data parallelism; `batches` start at progress.batch.

    An update that would spoil the weights is not made. Raises NonFiniteLoss after too many of them in a row, LossSpike where train.spike
    says so, ReplicasDiffer where ranks have drifted apart, Preempted after saving when told to stop.
    """
    train = config.train
    parameters = [p for p in module.parameters() if p.requires_grad]
    guard = watch.Guard(module, optimizer, scaler, progress, allowed=train.skip_updates, ranks=ranks)
    pace = _Pace()

    def part(batch: Batch, parts: int) -> dict[str, Tensor]:
        """Forward and backward pass of one of so many parts of a step; its share of the step's figures."""
        with computing(precision, ranks.device):
            output = forward(module, batch)
        scaler.scale(output.loss / parts).backward()
        return {name: value.float() / parts for name, value in {"loss": output.loss.detach(), **output.metrics}.items()}

    with halves.side_by_side(part, module, train, ranks) as work:
        while (done := plan.done(progress.step, distributed.from_first(progress.seconds, ranks) if plan.seconds else 0)) < 1:
            began = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - began
            lr = plan.learning_rate(done)
            optim.set_learning_rate(optimizer, lr)

            total: dict[str, Tensor] = {}
            for i, batch in enumerate(micro_batches):
                with parallel.accumulating(module, i + 1 < len(micro_batches)):
                    total = _add(total, work(batch, len(micro_batches)))
                progress.replaced += batch.replaced

            scaler.unscale_(optimizer)
            norm = parallel.total_norm(parameters)
            if config.optim.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, config.optim.clip, norm)
            if not guard.forbids(total["loss"], norm):
                optimizer.step()
                if average is not None:
                    average.update(guard.made())
            scaler.update()
            optimizer.zero_grad(set_to_none=True)

            progress.step += 1
            row = None
            if progress.step % train.log_every == 0:
                guard.check(progress.step)
                row = _row(progress, plan, total, norm, lr, micro_batches, ranks)
            seconds = time.perf_counter() - began  # at a logged step that is when the device is done
            progress.seconds += seconds
            pace.step(seconds, waited)
            if row is not None:
                hooks.log(row | pace.row(plan.batch_size, ranks))
                if train.spike is not None and row["loss_excess"] > train.spike:
                    raise watch.spike(progress.step, row, train.log_every)
            if train.check_replicas and progress.step % train.check_replicas == 0:
                watch.compare_replicas(module, ranks)
            if train.evaluate_every and progress.step % train.evaluate_every == 0:
                hooks.evaluate(progress.step)
            if config.track.images_every and progress.step % config.track.images_every == 0:
                hooks.picture(progress.step)
            resumed = time.perf_counter()
            stop = distributed.any_rank(hooks.stop(), ranks)
            if stop or progress.step % train.checkpoint_every == 0:
                guard.check(progress.step)
                hooks.save(progress)
            progress.seconds += time.perf_counter() - resumed  # saving is part of a wall-clock budget, evaluation and pictures are not
            if stop:
                raise Preempted(f"stopped by a signal after step {progress.step}, saved: run the same command to go on")
        guard.check(progress.step)


def _add(total: dict[str, Tensor], part: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: total.get(name, 0) + value for name, value in part.items()}


def _row(
    progress: Progress, plan: Plan, total: dict[str, Tensor], norm: Tensor, lr: float, micro_batches: list[Batch], ranks: Ranks
) -> dict[str, Any]:
    """The figures of the step just taken; losses are means over ranks. The only place where the host waits for the device."""
    values = distributed.mean(torch.stack([v.float() for v in total.values()]), ranks).tolist()
    figures = dict(zip(total, values, strict=True))
    loss = figures.pop("loss")
    mixed = torch.cat([keyed.bits(b.keys, 1, "order")[:, 0] for b in micro_batches]).sum()  # a sum has no order
    batch_hash = int(distributed.total(mixed, ranks)) & (1 << 64) - 1
    replaced = int(distributed.total(torch.tensor(progress.replaced, device=ranks.device), ranks))
    samples = progress.step * plan.batch_size
    return {
        "step": progress.step,
        "samples": samples,
        "epoch": progress.step / plan.steps_per_epoch,
        "loss": loss,
        "lr": lr,
        "grad_norm": float(norm),
        **figures,
        "loss_excess": watch.note_loss(progress, loss),
        "skipped_updates": progress.skipped,
        "replaced": replaced,
        "batch_hash": f"{batch_hash:016x}",
    }


class _Pace:
    """Images a second and the share of the time spent waiting for data, since the last row."""

    def __init__(self) -> None:
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0

    def step(self, seconds: float, waited: float) -> None:
        self.steps, self.seconds, self.waited = self.steps + 1, self.seconds + seconds, self.waited + waited

    def row(self, batch_size: int, ranks: Ranks) -> dict[str, float]:
        """Images of all ranks; the wait of the rank that waited longest, since the others wait for it."""
        waited = distributed.largest(torch.tensor(self.waited / self.seconds), ranks)
        row = {"images_per_second": self.steps * batch_size / self.seconds, "data_wait": float(waited)}
        self.__init__()  # type: ignore[misc]
        return row
