"""One training job in one run folder: what pretraining, probing and fine-tuning have in common around the loop."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mae.config import Config
from mae.data import substitute
from mae.data.batch import normalise
from mae.data.loader import Batch, evaluation_batches, train_batches
from mae.data.sources import Splits
from mae.errors import ConfigError, LossSpike, NonFiniteLoss, Preempted
from mae.methods.base import Output
from mae.nets import precision
from mae.nets.vit import choose_attention
from mae.training import blocks, checkpoint, distributed, flops, going_on, histograms, lineage, optim, parallel, state, watch
from mae.training.alarms import Alarms
from mae.training.console import Console
from mae.training.distributed import Ranks
from mae.training.loop import Hooks, fit
from mae.training.progress import Progress
from mae.training.run import RunFolder, fingerprint
from mae.training.saving import Saver, see_the_same
from mae.training.schedule import Plan
from mae.training.signals import Stop
from mae.training.tracking import Tracker

log = logging.getLogger("mae")

NOTICE_SECONDS = 10  # that W&B gets for its last words where a scheduler may be about to kill the job


@dataclasses.dataclass(frozen=True)
class Job:
    """What is particular to a kind of job."""

    kind: str  # pretrain | linear_probe | finetune: the W&B job type
    name: str  # of the run, in W&B
    build: Callable[[], nn.Module]
    forward: Callable[[nn.Module, Batch], Output]
    loss: Callable[[nn.Module, Tensor, Tensor], Output]  # (module, images, keys): what `forward` computes, or what costs as much
    held_out: Callable[..., dict[str, float]]  # (module, device, interval=, trained= seconds) -> figures on held-out data, while training
    finish: Callable[[nn.Module, Tracker, torch.device, int], None]  # on rank 0, when training is over after so many steps
    draw: Callable[[nn.Module, Tracker, torch.device, int], object] | None = None  # pictures while training, on rank 0
    transform: Callable[[np.ndarray, int], Tensor] | None = None  # a training augmentation of its own
    reads: Sequence[lineage.Artifact] = ()  # for W&B: what it starts from, besides the images


def run(job: Job, config: Config, folder: RunFolder, splits: Splits, plan: Plan) -> None:
    """Trains (or goes on training) in the run folder, then finishes on rank 0.

    Raises ConfigError before anything is made, NonFiniteLoss and Preempted with the folder left ready to go on.
    """
    with contextlib.ExitStack() as stack:
        with distributed.start(config.train.device, config.train.timeout) as ranks:
            torch.use_deterministic_algorithms(config.train.deterministic)
            torch.manual_seed(config.train.seed)
            module = job.build()
            choose_attention(module, ranks.device, precision=precision.choose(config.train.precision, ranks.device))
            if config.data.decode == "gpu" and ranks.device.type != "cuda":
                raise ConfigError(f"data.decode=gpu unpacks JPEGs on a CUDA device, and this run is on {ranks.device}: leave it out")
            if getattr(module, "batch_statistics", False) and config.train.accumulate not in ("auto", 1):
                raise ConfigError(f"{config.method['name']} looks at whole batches, which accumulation cuts up: set train.accumulate=1")
            engine = parallel.choose(config.train.parallel, module, config.optim, average=config.train.ema is not None, ranks=ranks)
            costs = _costs(job, config, module, engine, ranks)
            blocks.recompute(module, config.train.recompute)
            derived = _derived(config, splits, plan, module, ranks) | costs | {"parallel": f"{engine.name} ({engine.reason})"}
            stop = stack.enter_context(Stop())
            distributed.first_does(lambda: _take(folder, config, derived, stack), ranks)
            see_the_same(folder, ranks)
            tracker = Tracker(config, folder.path, job.kind, name=job.name, derived=derived) if ranks.first else None
            stack.enter_context(_status(folder, tracker))
            if tracker is not None:
                for artifact in (lineage.data_set(config, splits), *job.reads):
                    tracker.uses(artifact)
            if getattr(module, "learns", True):
                spread = parallel.Spread(engine.name, module, ranks)
                module, steps = _train(job, config, folder, splits, plan, spread, ranks, derived, tracker, stop)
            else:
                module, steps = module.to(ranks.device), 0
                distributed.first_does(lambda: _settle(module, config, folder, splits, ranks, derived), ranks)
        if tracker is not None:  # the other ranks are done: finishing may take longer than they would wait
            with stop.raising("stopped while evaluating; the training is saved: run the same command to evaluate"):
                job.finish(module.eval(), tracker, ranks.device, steps)


@contextlib.contextmanager
def _status(folder: RunFolder, tracker: Tracker | None) -> Iterator[None]:
    """Keeps status.json and W&B's state true, however the job ends."""
    try:
        yield
    except BaseException as error:
        if tracker is not None:
            folder.status("preempted" if isinstance(error, Preempted) else "failed", reason=str(error))
            if not isinstance(error, Preempted):
                tracker.alert("the run has failed", f"{type(error).__name__}: {error}")
            tracker.finish(exit_code=1, within=NOTICE_SECONDS)
        raise
    if tracker is not None:
        tracker.finish()
        folder.status("done")


def _take(folder: RunFolder, config: Config, derived: dict[str, Any], stack: contextlib.ExitStack) -> None:
    """Makes and locks the run folder, once everything else is known to be good."""
    previous = folder.derived()
    if previous is not None and previous["data"] != derived["data"]:
        raise ConfigError(
            f"the training images are not those that {folder.path} was started with ({previous['data']}, now {derived['data']}): "
            "bring them back or choose another run.dir=..."
        )
    try:
        stack.enter_context(folder.locked())
        folder.create(config, derived)
        checkpoint.sweep(folder.checkpoints)
        folder.status("running")
    except OSError as error:
        raise ConfigError(f"run.dir {folder.path} cannot be written to ({error.strerror}): choose another run.dir=...") from error
    words = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in derived.items() if v is not None)
    log.info("%s: %s", folder.path, words)


def _derived(config: Config, splits: Splits, plan: Plan, module: nn.Module, ranks: Ranks) -> dict[str, Any]:
    """What follows from the configuration on this machine."""
    return {
        "data": f"{config.data.name}@{splits.train.fingerprint}",
        "images": len(splits.train),
        "held_out": len(splits.validation),
        "steps": plan.steps,
        "steps_per_epoch": plan.steps_per_epoch,
        "learning_rate": plan.peak_lr,
        "accumulate": 1 if config.train.accumulate == "auto" else config.train.accumulate,
        "precision": precision.choose(config.train.precision, ranks.device),
        "device": str(ranks.device),
        "ranks": ranks.world,
        "parameters": sum(p.numel() for p in module.parameters()),
    }


def _costs(job: Job, config: Config, module: nn.Module, engine: parallel.Engine, ranks: Ranks) -> dict[str, float]:
    """FLOPs of a training image, FLOPs a second that the device can do. Every rank calls it: a loss may look at all of them."""
    if not getattr(module, "learns", True):
        return {}
    where = torch.device("cpu") if engine.name == "fsdp" else ranks.device  # a module that is to be sharded may not fit as a whole
    image = flops.per_image(module, job.loss, (config.data.channels, *config.image_size), device=where)
    dtype = precision.DTYPES[precision.choose(config.train.precision, ranks.device)]
    return {"flops_per_image": image, "device_flops": flops.of_device(ranks.device, dtype)}


def _train(
    job: Job,
    config: Config,
    folder: RunFolder,
    splits: Splits,
    plan: Plan,
    spread: parallel.Spread,
    ranks: Ranks,
    derived: dict[str, Any],
    tracker: Tracker | None,
    stop: Stop,
) -> tuple[nn.Module, int]:
    """Trains from where the folder stands; returns the module with all its weights (on rank 0) and the steps taken."""
    module = spread.module.train()
    optimizer = optim.create(module, config.optim, derived["precision"])
    average = optim.Average(module, config.train.ema) if config.train.ema is not None else None
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=derived["precision"] == "fp16")
    saver = Saver(folder, config.run, ranks, {"config": fingerprint(config), "data": derived["data"]})
    if config.train.compile:
        spread.compile()
    wrapped = spread.wrapped()

    def rehearse() -> Tensor:
        with precision.computing(derived["precision"], ranks.device):
            return job.forward(wrapped, _blank(config, ranks, derived["accumulate"])).loss

    def resume(until: int | None = None) -> Progress:
        return going_on.resume(saver, spread, rehearse, optimizer, average, scaler, until)

    progress = resume()
    begun_at, begun_with = progress.step, progress.seconds
    console = Console(plan, progress.step, progress.seconds, first=ranks.first)
    alarms = Alarms(folder, tracker, progress.seconds, goes_back=config.train.spike is not None) if tracker is not None else None

    def write(row: dict[str, Any]) -> None:
        if tracker is not None:
            folder.append(row)
            tracker.log(row)

    if tracker is not None and tracker.on and (every := config.track.histograms_every):
        histograms.before_updates(
            optimizer,
            module,
            wanted=lambda: (progress.step + 1) % every == 0,
            send=lambda found: tracker.histograms(found, progress.step + 1),
        )

    def log_row(row: dict[str, Any]) -> None:
        if alarms is not None:
            write(row | watch.costs(row, derived, ranks))
            alarms.look(row, progress.seconds)
        console.row(row, progress.seconds)
        check_damage(row["replaced"])

    def check_damage(replaced: int) -> None:
        substitute.check(replaced, progress.batch * plan.batch_size, len(splits.train), config.data.damage)

    def save(progress: Progress) -> None:
        """Everything a resumed run needs; every rank calls it, the first one writes."""
        watch.compare_replicas(module, ranks)
        replaced = int(distributed.total(torch.tensor(progress.replaced, device=ranks.device), ranks))
        tensors, scalars = state.take(module, optimizer, average)
        scalars |= {"progress": dataclasses.asdict(progress) | {"replaced": replaced}, "scaler": scaler.state_dict()}
        saver.save(progress.step, tensors, scalars, samples=progress.batch * plan.batch_size)
        check_damage(replaced)

    def held_out(step: int) -> None:
        """A row of figures on held-out images; the first rank looks while the others wait."""
        with spread.whole() as whole:
            if whole is not None:
                pace = (progress.seconds - begun_with) / (step - begun_at)
                interval = pace * config.train.evaluate_every
                figures = job.held_out(whole, ranks.device, interval=interval, trained=progress.seconds - begun_with)
                write({"step": step, "samples": step * plan.batch_size, **figures})

    def picture(step: int) -> None:
        if job.draw is not None:
            with spread.whole() as whole:
                if whole is not None and tracker is not None:
                    job.draw(whole, tracker, ranks.device, step)

    def batches() -> Generator[list[Batch], None, None]:
        """The steps' images from where the run stands, which after going back is another place."""
        return train_batches(
            splits.train,
            config,
            first_step=progress.batch,
            device=ranks.device,
            rank=ranks.rank,
            world=ranks.world,
            accumulate=derived["accumulate"],
            transform=job.transform,
        )

    hooks = Hooks(log=log_row, save=save, evaluate=held_out, picture=picture, stop=lambda: stop.asked)
    with saver, contextlib.closing(console):
        while True:
            try:
                with contextlib.closing(batches()) as stream:
                    fit(
                        wrapped,
                        job.forward,
                        stream,
                        optimizer=optimizer,
                        average=average,
                        scaler=scaler,
                        plan=plan,
                        progress=progress,
                        config=config,
                        precision=derived["precision"],
                        ranks=ranks,
                        hooks=hooks,
                    )
                break
            except NonFiniteLoss as error:
                raise NonFiniteLoss(f"{error}. The newest checkpoint in {folder.checkpoints} is from before it") from None
            except LossSpike as spike:
                progress = going_on.go_back(spike, progress, saver, resume, alarms)
                begun_at, begun_with = progress.step, progress.seconds
        if progress.step > begun_at:
            save(progress)
    if average is not None:
        average.swap()
    return spread.release(), progress.step


def _blank(config: Config, ranks: Ranks, accumulate: int) -> Batch:
    """As many black images as a rank sees at a time."""
    count = config.train.batch_size // ranks.world // accumulate
    pixels = torch.zeros(count, config.data.channels, *config.image_size, dtype=torch.uint8, device=ranks.device)
    numbers = torch.zeros(count, dtype=torch.int64, device=ranks.device)
    return Batch(pixels, keys=numbers, labels=numbers, ids=numbers, replaced=0, seed=0)


def _settle(module: nn.Module, config: Config, folder: RunFolder, splits: Splits, ranks: Ranks, derived: dict[str, Any]) -> None:
    """A method that no gradient trains: one pass over the training images where it has a closed form, then its only checkpoint."""
    fit_to = getattr(module, "fit", None)
    if fit_to is not None:
        batches = evaluation_batches(splits.train, config, batch_size=1024, device=ranks.device)
        with torch.no_grad():
            fit_to((normalise(batch.images, config.data), batch.keys) for batch in batches)
    tensors = {f"model.{k}": v for k, v in module.state_dict().items()}
    facts = {"config": fingerprint(config), "data": derived["data"], "world": ranks.world, "samples": 0}
    checkpoint.save(folder.checkpoints, 0, tensors, {}, facts=facts, keep=config.run.keep)
