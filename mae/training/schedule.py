"""The learning rate as a pure function of how much of the run is done: linear warm-up, then half a cosine."""

import math
from dataclasses import dataclass

from mae.config import Config
from mae.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """How long a run is and what the learning rate does; exactly one of `steps` and `seconds` is set."""

    peak_lr: float
    min_lr: float
    warmup: float  # share of the run
    steps: int | None
    seconds: float | None
    batch_size: int  # images a step over all ranks
    steps_per_epoch: float

    def done(self, step: int, seconds: float) -> float:
        """The share of the run that is over, after `step` steps and `seconds` of training; 1 or more = finished."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        return seconds / self.seconds

    def learning_rate(self, done: float) -> float:
        """The rate for the step taken when this share of the run is over: 0 -> peak_lr in the warm-up, then cosine to min_lr."""
        if done < self.warmup:
            return self.peak_lr * done / self.warmup
        through = min((done - self.warmup) / (1 - self.warmup), 1) if self.warmup < 1 else 1.0
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * through))


def plan(config: Config, images: int) -> Plan:
    """The plan of a run over so many training images; epochs concatenate, so that steps = ceil(epochs x N / batch).

    Raises ConfigError for a warm-up that is longer than the run.
    """
    train, optim = config.train, config.optim
    steps_per_epoch = images / train.batch_size
    steps = train.steps
    if train.epochs is not None:
        steps = max(math.ceil(train.epochs * images / train.batch_size), 1)
    if optim.warmup_epochs == "auto":
        warmup = 0.05 if steps is None else min(0.05, 40 * steps_per_epoch / steps)
    elif steps is None:
        raise ConfigError("optim.warmup_epochs counts epochs, but train.minutes does not say how many there will be: leave it at auto")
    else:
        warmup = optim.warmup_epochs * steps_per_epoch / steps
        if warmup > 1 + 1e-9:  # a warm-up as long as the run is fine, whatever the rounding
            run = f"{steps / steps_per_epoch:.3g} epochs"
            raise ConfigError(f"optim.warmup_epochs {optim.warmup_epochs} is longer than the run of {run}: shorten it or leave it at auto")
    return Plan(
        peak_lr=optim.base_lr * train.batch_size / 256,
        min_lr=optim.min_lr,
        warmup=min(warmup, 1.0),
        steps=steps,
        seconds=None if train.minutes is None else 60 * train.minutes,
        batch_size=train.batch_size,
        steps_per_epoch=steps_per_epoch,
    )
