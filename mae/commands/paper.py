"""A run on paper: what so many GPUs of a kind would make of it, by the formulas of mae.training.estimate."""

import torch

from mae.config import Config
from mae.data.sources import open_splits
from mae.errors import ConfigError
from mae.methods.build import build
from mae.training import estimate, parallel, schedule
from mae.training.arithmetic import shape_of
from mae.units import duration, si, size


def show(config: Config, gpu: str, ranks: int) -> None:
    """Prints engine, memory, traffic and time on `ranks` GPUs (a key of estimate.DEVICES).

    Raises ConfigError for another method than a masked autoencoder, and where it does not fit.
    """
    device = estimate.DEVICES[gpu]
    with torch.device("meta"):  # shapes without memory
        method = build(config)
    try:
        shape = shape_of(method)
    except ValueError as error:
        raise ConfigError(f"{error}: leave --{gpu} out, so that the run is rehearsed") from error
    plan = schedule.plan(config, len(open_splits(config.data).train)) if config.train.steps is None else schedule.plan(config, 1)
    engine = parallel.decide(
        config.train.parallel, method, config.optim, average=config.train.ema is not None, world=ranks, there=device.memory
    )
    moments, average = parallel.MOMENTS[config.optim.name], config.train.ema is not None
    parts = 1 if config.train.accumulate == "auto" else int(config.train.accumulate)
    layout = estimate.Layout(
        ranks,
        config.train.batch_size // ranks // parts,
        accumulate=parts,
        sharded=engine.name == "fsdp",
        recompute=config.train.recompute,
        half=config.train.precision != "fp32",
    )
    memory = estimate.memory(shape, layout, moments=moments, average=average)
    step = estimate.seconds(shape, layout, device)
    steps = plan.steps if plan.steps is not None else max(int((plan.seconds or 0) / step), 1)
    alone = estimate.seconds(shape, estimate.Layout(1, layout.images, parts, recompute=layout.recompute, half=layout.half), device)
    lines = [
        ("model", f"{si(shape.parameters).strip()} parameters, {si(shape.flops)}FLOP a training image"),
        ("engine", f"{engine.name}: {engine.reason}"),
        ("memory", f"{size(memory)} of {size(device.memory)}"),
        ("sent", f"{size(estimate.traffic(shape, layout))} a GPU and step"),
        (
            "pace",
            f"{config.train.batch_size / step:,.0f} images/s, {1000 * step:.3g} ms a step; {alone / step:.0%} of {ranks} times one GPU's",
        ),
        ("training", f"{duration(steps * step)} for {steps:,} steps, {ranks * steps * step / 3600:.3g} GPU-hours"),
    ]
    for about, fact in lines:
        print(f"  {about:<12}{fact}")
    print(f"\n  On paper, for {ranks} x {device.name}; not measured yet. What is assumed: docs/scaling.md.")
    if memory > estimate.ROOM * device.memory:
        raise ConfigError(
            f"{size(memory)} are more than {estimate.ROOM:.0%} of the GPU's memory: raise train.accumulate or set train.recompute"
        )
