"""What contradicts itself in the words alone: seen before anything is imported, opened or made."""

import os

from mae.errors import ConfigError
from mae.keys import Config
from mae.nets import names
from mae.nets.sizes import code, grid, hidden_count, patch_size

DURATIONS = ("epochs", "steps", "minutes")
ABOVE_ZERO = [f"train.{k}" for k in (*DURATIONS, "batch_size", "log_every", "checkpoint_every", "timeout", "spike")]
ABOVE_ZERO += ["run.keep", "run.keep_every", "optim.clip", "optim.layer_decay"]
WITHOUT_PATH = ("digits", "shapes")  # data sets that need no files
NOT_BELOW_ZERO = [
    "train.skip_updates",
    "train.check_replicas",
    "train.evaluate_every",
    "track.images_every",
    "track.histograms_every",
    "data.workers",
]
NOT_BELOW_ZERO += ["optim.base_lr", "optim.min_lr", "optim.weight_decay"]


def check(config: Config) -> None:
    """Raises ConfigError for the first contradiction."""
    if config.encoder.name not in names.OWN:
        names.check(config.encoder.name)
    rows, columns = grid(_image_size(config), patch_size(config.encoder.name, config.encoder.patch_size))
    _check_channels(config)
    _check_method(config, rows * columns)
    t, world = config.train, int(os.environ.get("WORLD_SIZE", 1))
    if sum(getattr(t, d) is not None for d in DURATIONS) != 1:
        raise ConfigError("how long to train is not said: give train.epochs, train.steps or train.minutes")
    _check_ranges(config)
    _check_spike(config)
    if t.parallel == "fsdp" and config.optim.name in ("muon", "lars"):
        raise ConfigError(f"optim.name {config.optim.name} needs whole matrices, which train.parallel=fsdp cuts up: choose adamw or ddp")
    accumulate = 1 if t.accumulate == "auto" else t.accumulate
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigError(f"train.accumulate {accumulate!r} must be auto or a whole number from 1")
    parts = world * accumulate
    if t.batch_size % parts:
        raise ConfigError(
            f"train.batch_size {t.batch_size} is not a multiple of ranks x accumulate = {world} x {accumulate}: "
            f"try {max(round(t.batch_size / parts), 1) * parts}"
        )
    warmup = config.optim.warmup_epochs
    if warmup != "auto":
        if not isinstance(warmup, int | float) or warmup < 0:
            raise ConfigError(f"optim.warmup_epochs {warmup!r} must be auto or a number of epochs")
        if t.epochs is not None and warmup > t.epochs:
            raise ConfigError(f"optim.warmup_epochs {warmup} is longer than the run of {t.epochs} epochs: try {t.epochs / 20:g} or auto")


def _check_method(config: Config, patches: int) -> None:
    """What a method's words and those about images say of each other; what hangs on the encoder's width shows once it is made."""
    method, d = config.method, config.data
    if "mask_ratio" in method:
        hidden_count(patches, method["mask_ratio"])
    size = method.get("bottleneck_size")
    if isinstance(size, int) and config.encoder.name not in ("dense", "linear"):  # of which one token is the whole image
        kind = method.get("bottleneck", "global")
        values = d.channels * config.image_size[0] * config.image_size[1]
        code(size, values if kind == "global" else values // patches, config.encoder.embed_dim, kind)
    if method.get("loss") == "bce" and any((*d.mean, *(s - 1 for s in d.std))):
        raise ConfigError(
            "method.loss=bce takes pixels in [0, 1], but data.mean and data.std move them: set mean to 0 and std to 1, or another loss"
        )


def _check_ranges(config: Config) -> None:
    for group, least in ((ABOVE_ZERO, "above zero"), (NOT_BELOW_ZERO, "zero or above")):
        for name in group:
            section, key = name.split(".")
            value = getattr(getattr(config, section), key)
            if value is not None and (value < 0 or (value == 0 and group is ABOVE_ZERO)):
                raise ConfigError(f"{name} {value} must be {least}")
    if config.train.ema is not None and not 0 <= config.train.ema < 1:
        raise ConfigError(f"train.ema {config.train.ema} must be a decay from 0 to below 1, such as 0.999")


def _check_spike(config: Config) -> None:
    """A spike is known three logged steps after it began: a checkpoint from before it must still be there then."""
    t = config.train
    if t.spike is None:
        return
    if (config.run.keep - 1) * t.checkpoint_every < 3 * t.log_every:
        raise ConfigError(
            f"train.spike goes back 3 x log_every = {3 * t.log_every} steps or more, but checkpoints reach back only "
            f"(keep - 1) x checkpoint_every = {(config.run.keep - 1) * t.checkpoint_every}: raise run.keep or train.checkpoint_every"
        )


def _image_size(config: Config) -> tuple[int, int]:
    size = config.data.image_size
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list | tuple) or len(sides) != 2 or not all(isinstance(s, int) and s > 0 for s in sides):
        raise ConfigError(f"data.image_size {size!r} must be a number of pixels or [height, width]")
    return config.image_size


def _check_channels(config: Config) -> None:
    d = config.data
    for name in ("mean", "std"):
        values = getattr(d, name)
        if values and len(values) != d.channels:  # none: not computed yet
            raise ConfigError(f"data.{name} has {len(values)} values for data.channels={d.channels}: give one a channel")
    if any(std <= 0 for std in d.std):
        raise ConfigError(f"data.std {d.std} must be above 0 in every channel: `mae statistics` computes it")
    low, high = (*d.crop_scale, 0, 0)[:2]
    if len(d.crop_scale) != 2 or not 0 < low <= high <= 1:
        raise ConfigError(f"data.crop_scale {d.crop_scale} must be [least, most] with 0 < least <= most <= 1")
    if not 0 <= d.validation < 1:
        raise ConfigError(f"data.validation {d.validation} must be a share from 0 to below 1")
    if d.path is not None and d.name in WITHOUT_PATH:
        raise ConfigError(f"data.path={d.path} means nothing to the {d.name}: for a folder of images say configs/data/folder.yaml too")
    if d.name == "stream" and config.evaluate.protocols:
        raise ConfigError("data.name=stream gives no image by its number: set evaluate.protocols=[], and run `mae evaluate` on other data")
    if not 0 <= d.damage <= 1:
        raise ConfigError(f"data.damage {d.damage} must be a share of the images, from 0 to 1")
