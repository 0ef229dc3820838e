"""Pretraining proper: everything is known to be good, now method, optimizer, folder and loop come together."""

import contextlib
import dataclasses
import logging
from functools import partial
from typing import Any

import torch
from torch import nn

from mae.commands import closing
from mae.config import Config
from mae.data.loader import Batch, normalise, train_batches
from mae.data.sources import Splits
from mae.errors import ConfigError, NonFiniteLoss, Preempted
from mae.evaluation import reconstruction
from mae.methods.base import Autoencoder, Output
from mae.methods.build import build
from mae.training import checkpoint, distributed, optim, precision
from mae.training.console import Console
from mae.training.distributed import Ranks
from mae.training.loop import Hooks, Progress, fit
from mae.training.run import RunFolder
from mae.training.schedule import Plan
from mae.training.signals import Stop
from mae.training.tracking import Tracker

log = logging.getLogger("mae")


def pretrain(config: Config, folder: RunFolder, splits: Splits, plan: Plan) -> None:
    """Trains (or goes on training) in the run folder, then evaluates on rank 0.

    Raises ConfigError before anything is made, NonFiniteLoss and Preempted with the folder left ready to go on.
    """
    with contextlib.ExitStack() as stack:
        with distributed.start(config.train.device) as ranks:
            torch.use_deterministic_algorithms(config.train.deterministic)
            torch.manual_seed(config.train.seed)
            method = build(config).to(ranks.device)
            derived = _derived(config, splits, plan, method, ranks)
            distributed.first_does(lambda: _take(folder, config, derived, stack), ranks)
            tracker = Tracker(config, folder.path, "pretrain", name=folder.path.name, derived=derived) if ranks.first else None
            try:
                _train(config, folder, splits, plan, method, ranks, derived, tracker)
            except BaseException as error:
                if ranks.first:
                    folder.status("preempted" if isinstance(error, Preempted) else "failed", reason=str(error))
                if tracker is not None:
                    tracker.finish(exit_code=1)
                raise
        # the other ranks are done: evaluation may take longer than they would wait
        if tracker is not None:
            closing.evaluate_run(config, folder, splits, method, tracker, ranks.device)


def _take(folder: RunFolder, config: Config, derived: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """Makes and locks the run folder, once everything else is known to be good."""
    previous = folder.derived()
    if previous is not None and previous["data"] != derived["data"]:
        raise ConfigError(
            f"the training images are not those that {folder.path} was started with ({previous['data']}, now {derived['data']}): "
            "bring them back or choose another run.dir=..."
        )
    stack.enter_context(folder.locked())
    folder.create(config, derived)
    checkpoint.sweep(folder.checkpoints)
    folder.status("running")
    words = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in derived.items())
    log.info("%s: %s", folder.path, words)


def _derived(config: Config, splits: Splits, plan: Plan, method: Autoencoder, ranks: Ranks) -> dict[str, Any]:
    """What follows from the configuration on this machine."""
    return {
        "data": f"{config.data.name}@{splits.train.fingerprint}",
        "images": len(splits.train),
        "held_out": len(splits.validation),
        "steps": plan.steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "learning_rate": plan.peak_lr,
        "accumulate": _accumulate(config),
        "precision": precision.choose(config.train.precision, ranks.device),
        "device": str(ranks.device),
        "ranks": ranks.world,
        "encoder_parameters": sum(p.numel() for p in method.encoder.parameters()),
        "parameters": sum(p.numel() for p in method.parameters()),
    }


def _accumulate(config: Config) -> int:
    return 1 if config.train.accumulate == "auto" else config.train.accumulate


def _train(
    config: Config,
    folder: RunFolder,
    splits: Splits,
    plan: Plan,
    method: Autoencoder,
    ranks: Ranks,
    derived: dict[str, Any],
    tracker: Tracker | None,
) -> None:
    optimizer = optim.create(method, config.optim)
    average = optim.Average(method, config.train.ema) if config.train.ema is not None else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=derived["precision"] == "fp16")
    progress = _resume(folder, method, optimizer, average, scaler, ranks)
    if config.train.compile:
        method.compile()
    module = distributed.data_parallel(method, ranks)
    console = Console(plan, progress.step, progress.seconds, first=ranks.first)

    def log_row(row: dict[str, Any]) -> None:
        if tracker is not None:
            folder.append(row)
            tracker.log(row)
            console.row(row, progress.seconds)

    def save(progress: Progress) -> None:
        replaced = int(distributed.total(torch.tensor(progress.replaced, device=ranks.device), ranks))
        tensors, scalars = checkpoint.state_of(method, optimizer, average)
        scalars |= {"progress": dataclasses.asdict(progress) | {"replaced": replaced}, "scaler": scaler.state_dict()}
        facts = {"data": derived["data"], "world": ranks.world, "samples_consumed": progress.step * plan.batch_size}
        commit = partial(checkpoint.save, folder.checkpoints, progress.step, tensors, scalars, facts=facts, keep=config.run.keep)
        distributed.first_does(commit, ranks)

    def held_out(step: int) -> None:
        if tracker is None:
            return
        figures = reconstruction.held_out(method, splits, config, device=ranks.device).figures
        row = {"step": step, "samples": step * plan.batch_size, **{f"held_out/{k}": v for k, v in figures.items()}}
        folder.append(row)
        tracker.log(row)

    def forward(module: nn.Module, batch: Batch) -> Output:
        return module(normalise(batch.images, config.data), keys=batch.keys)

    batches = train_batches(
        splits.train,
        config,
        first_step=progress.step,
        device=ranks.device,
        rank=ranks.rank,
        world=ranks.world,
        accumulate=derived["accumulate"],
    )
    method.train()
    with Stop() as stop, contextlib.closing(batches):
        try:
            fit(
                module,
                forward,
                batches,
                optimizer=optimizer,
                average=average,
                scaler=scaler,
                plan=plan,
                progress=progress,
                config=config,
                precision=derived["precision"],
                ranks=ranks,
                hooks=Hooks(log=log_row, save=save, evaluate=held_out, stop=lambda: stop.asked),
            )
        except NonFiniteLoss as error:
            raise NonFiniteLoss(f"{error}. The newest checkpoint in {folder.checkpoints} is from before it") from None
        finally:
            console.close()
    save(progress)
    if average is not None:
        average.swap()


def _resume(
    folder: RunFolder,
    method: Autoencoder,
    optimizer: torch.optim.Optimizer,
    average: optim.Average | None,
    scaler: torch.amp.GradScaler,
    ranks: Ranks,
) -> Progress:
    """Goes back to the newest good checkpoint, if there is one."""
    found = checkpoint.load_newest(folder.checkpoints)
    if found is None:
        distributed.first_does(lambda: folder.rewind(0), ranks)
        return Progress()
    path, tensors, scalars = found
    checkpoint.restore(tensors, scalars, method, optimizer, average)
    scaler.load_state_dict(scalars["scaler"])
    progress = Progress(**scalars["progress"])
    if not ranks.first:
        progress.replaced = 0  # the count is the sum over ranks: one of them goes on with it
    distributed.first_does(lambda: folder.rewind(progress.step), ranks)
    log.info("resuming from %s", path)
    return progress
