"""The story of the doctor: what could keep a run from starting, and what it will take, before it costs anything."""

import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mae import config as configuration
from mae.commands import door, options
from mae.config import Config
from mae.errors import ConfigError
from mae.training.run import RunFolder, default_folder
from mae.units import duration, si, size

if TYPE_CHECKING:  # torch comes with them: only once the words are known to be good
    import torch

    from mae.commands.rehearsal import Prediction
    from mae.data.sources import Splits
    from mae.training.schedule import Plan

BEGAN = time.perf_counter()
USAGE = """
usage: mae doctor [FILE.yaml ...] [section.key=value ...] [--ranks N] [--a100 | --h100 | --h200]

Checks whether a run of these words could start here, then rehearses it for some seconds in a temporary folder and predicts what it takes:
time, memory, disk. Nothing of it is kept. Exit code 2 where the run could not start.

  --ranks N   whole number (1): as one of N ranks, with their share of the batch, the engine that train.parallel=auto takes and what they
              send each other
  --a100, --h100, --h200
              on paper, for N of these GPUs, without rehearsing (masked autoencoders; docs/scaling.md says what is assumed)
"""
GPUS = ("a100", "h100", "h200")
LEAST = {"torch": (2, 6), "timm": (1, 0, 15)}
PYTHON = (3, 11)
COMPILERS = ("g++", "c++", "clang++")
PREFETCHED = 2  # batches that a worker holds ready


class Finding(NamedTuple):
    """One thing looked at, and where it would keep the run from starting, the way out."""

    about: str
    fact: str
    remedy: str | None = None


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words)


def _story(words: list[str]) -> None:
    gpus, numbers, _, words = options.pick(words, GPUS, {"ranks": None})
    arguments, _ = configuration.split_words(words)
    if arguments:
        raise ConfigError(f"{arguments[0]!r} is neither a .yaml file nor an override: write section.key=value")
    if len(gpus) > 1:
        raise ConfigError(f"--{' and --'.join(sorted(gpus))} exclude each other: choose one")
    config = configuration.load(words)
    ranks = numbers["ranks"] or 1
    parts = 1 if config.train.accumulate == "auto" else int(config.train.accumulate)
    if config.train.batch_size % (ranks * parts):
        raise ConfigError(
            f"train.batch_size {config.train.batch_size} is not a multiple of ranks x accumulate = {ranks} x {parts}: "
            f"try {max(round(config.train.batch_size / (ranks * parts)), 1) * ranks * parts}"
        )
    folder = RunFolder(default_folder(config))
    folder.check(config)
    print(f"{config.data.name}, {config.method['name']}, {config.encoder.name}, in {folder.path}\n")
    if gpus:
        from mae.commands import paper

        paper.show(config, gpus.pop(), ranks)
        return
    _report(_without_torch(config, folder))

    from mae.data.sources import open_splits
    from mae.training import schedule

    splits = open_splits(config.data)
    plan = schedule.plan(config, len(splits.train))
    _rehearsed(config, folder, splits, plan, ranks, parts)


def say(about: str, fact: str, mark: str = "") -> None:
    """A line of the report."""
    print(f"  {mark:<4}{about:<13}{fact}", flush=True)


def _report(findings: Sequence[Finding]) -> None:
    for about, fact, remedy in findings:
        say(about, fact, "NO" if remedy else "ok")
    remedies = [finding.remedy for finding in findings if finding.remedy]
    if remedies:
        raise ConfigError(f"the run could not start: {'; '.join(remedies)}")


def _without_torch(config: Config, folder: RunFolder) -> list[Finding]:
    """What is known before anything is imported or opened."""
    return [_versions(), _compiler(config), _room(folder), _state(folder), _tracking(config)]


def _versions() -> Finding:
    there = {name: importlib.metadata.version(name) for name in LEAST}
    fact = f"Python {platform.python_version()}, {', '.join(f'{name} {version}' for name, version in there.items())}"
    old = [name for name, least in LEAST.items() if _numbers(there[name]) < least]
    upgrades = " and ".join(f"{name} >= {'.'.join(map(str, LEAST[name]))}" for name in old)
    return Finding("versions", fact, f"install {upgrades}" if old else None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".") if part.isdigit())


def _compiler(config: Config) -> Finding:
    if not config.train.compile:
        return Finding("compiler", "not needed, train.compile is false")
    found = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), *COMPILERS))), None)
    return Finding("compiler", found or "none", None if found else "install a C++ compiler (g++), or set train.compile=false")


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.is_dir())


def _room(folder: RunFolder) -> Finding:
    place = _existing(folder.path)
    fact = f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free in {place}"
    return Finding("disk", fact, None if os.access(place, os.W_OK) else f"{place} cannot be written to: choose another run.dir=...")


def _state(folder: RunFolder) -> Finding:
    state = folder.state()
    facts = {None: "new", "done": "finished: the same command shows its results"}
    return Finding("run folder", facts.get(state, f"there, {state}: the same command goes on with it"))


def _tracking(config: Config) -> Finding:
    from mae.training.tracking import mode

    return Finding("W&B", mode(config.track.wandb))


def _rehearsed(config: Config, folder: RunFolder, splits: "Splits", plan: "Plan", ranks: int, parts: int) -> None:
    from mae.commands.rehearsal import affordable, predict, rehearse
    from mae.methods.build import build
    from mae.nets import precision
    from mae.training import distributed, flops, parallel

    start = time.perf_counter() - BEGAN  # the run begins like this too
    device = distributed.device_of(config.train.device)
    chosen = precision.choose(config.train.precision, device)
    rate = flops.of_device(device, precision.DTYPES[chosen])
    images = config.train.batch_size // ranks // parts
    method = build(config)
    shape = (config.data.channels, *config.image_size)
    cost = flops.per_image(method, lambda m, x, keys: m.forward(x, keys=keys), shape, device=device) if method.learns else 0.0
    there = parallel.memory(device) / (ranks if device.type == "cpu" else 1)
    average = config.train.ema is not None
    engine = parallel.decide(config.train.parallel, method, config.optim, average=average, world=ranks, there=there)
    _report([_device(device, chosen, rate), _data(splits), _shared_memory(config, images * parts)])

    beside, fits, half = _existing(folder.path), affordable(images, cost, rate), None
    if 1 < fits < images:  # two points of a line; the smaller one first, since the peak of memory only grows
        half = rehearse(config, splits, plan, images=fits // 2, cost=cost, rate=rate, beside=beside, evaluate=False)
    measured = rehearse(config, splits, plan, images=fits, cost=cost, rate=rate, beside=beside)
    found = predict(config, plan, measured, half, images=images, parts=parts, start=start)
    _report([_checkpoints(measured.checkpoint, config.run.keep, beside)])

    print()
    say("model", f"{si(sum(p.numel() for p in method.parameters())).strip()} parameters, {si(cost)}FLOP a training image")
    say("engine", f"{engine.name}: {engine.reason}")
    if found.steps:
        images_a_second = images * parts / found.step
        used = f"{images_a_second * cost / rate:.0%} of the device's matrix products, {measured.waiting:.0%} of the time waiting for data"
        say("pace", f"{ranks * images_a_second:,.0f} images/s, {1000 * found.step:.3g} ms a step; {used}")
    looked = "" if measured.share == 1 else f" on {measured.share:.0%} of the images"
    then = f", {size(measured.afterwards)} with what follows{looked}" if measured.afterwards > found.memory else ""
    say("memory", f"{size(found.memory)} while training{then}; there are {size(there)}{' a rank' if ranks > 1 else ''}")
    _say_time(found, ranks, cost * config.train.batch_size * found.steps)
    if ranks > 1:
        say("not in it", f"what {ranks} ranks send each other: --h100 and the like estimate that")
    for sentence in measured.skipped:
        say("not in it", sentence)
    if found.memory > there:
        raise ConfigError(f"{size(found.memory)} do not fit into {size(there)}: raise train.accumulate or set train.recompute")


def _say_time(found: "Prediction", ranks: int, flops: float) -> None:
    parts = {"training": found.training, "checkpoints": found.saving, "evaluation": found.evaluation, "start and pictures": found.rest}
    say("time", f"{duration(found.total)} = {' + '.join(f'{name} {duration(seconds)}' for name, seconds in parts.items())}")
    say("cost", f"{ranks * found.total / 3600:.3g} device-hours, {si(flops)}FLOP in {found.steps:,} steps")


def _device(device: "torch.device", precision: str, rate: float) -> Finding:
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Finding("device", f"{name}, {precision}: {si(rate)}FLOP/s in matrix products")


def _data(splits: "Splits") -> Finding:
    test = f"{len(splits.test):,} for testing" if splits.test else "none for testing"
    return Finding("data", f"{len(splits.train):,} images to learn from, {len(splits.validation):,} held out, {test}")


def _checkpoints(bytes_each: float, keep: int, place: Path) -> Finding:
    needed, free = (keep + 1) * bytes_each, shutil.disk_usage(place).free
    remedy = f"{size(needed)} of checkpoints do not fit into {size(free)}: make room in {place}, or choose another run.dir=..."
    return Finding("checkpoints", f"{size(bytes_each)} each, the newest {keep} kept", None if needed < free else remedy)


def _shared_memory(config: Config, images: int) -> Finding:
    workers, place = config.data.workers, Path("/dev/shm")
    if not workers or not place.is_dir():
        return Finding("workers", "none: images are read by the training process" if not workers else f"{workers}")
    height, width = config.image_size
    needed = workers * PREFETCHED * images * config.data.channels * height * width
    free = shutil.disk_usage(place).free
    fact = f"{workers}, which hold up to {size(needed)} ready in /dev/shm; {size(free)} are free"
    remedy = "lower data.workers, or give the container more (--shm-size, docs/cluster.md)"
    return Finding("workers", fact, None if needed < free else remedy)
