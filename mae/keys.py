"""Every configuration key: its type, default, and the line of help that `--help` shows."""

import re
from dataclasses import dataclass, field, fields
from typing import Any, cast

from omegaconf import OmegaConf


def spelt(field_name: str) -> str:
    """A field's name as users write it: `from` is no name for a Python attribute, so that its field is `from_`."""
    return field_name.rstrip("_")


def public(path: str | None) -> str | None:
    """A path as it may be shown and stored: of a URL without user, password and query, where keys and tokens are."""
    if path is None or "://" not in path:
        return path
    scheme, _, rest = path.partition("://")
    host, slash, place = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{place}"


def key(default: Any, doc: str) -> Any:
    """A configuration key: its default and its line of help. One that opens with `a | b:` or `at least 0, below 1:` limits the values."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class Data:
    """What is learnt from."""

    name: str = key(
        "digits",
        "digits | shapes | folder | shards | stream | arrays | cifar10 | cifar100 | mnist | fashion_mnist | stl10 | stl10_unlabeled | "
        "dsprites | hf: where the images come from",
    )
    path: str | None = key(
        None, "folder of images, arrays or tar shards; list.txt of images; URL of shards; name on the Hugging Face hub; file of dsprites"
    )
    length: int | None = key(None, "images of shapes or dsprites (null = 20,000 shapes, all dsprites); images a stream calls an epoch")
    image_size: Any = key(32, "pixels, one number or [height, width]")
    channels: int = key(3, "colour channels: 1 converts to grey, 3 to RGB; of arrays as many as they have")
    mean: list[float] = key([0.485, 0.456, 0.406], "per channel, of pixels scaled to [0, 1]; [] = not known, `mae statistics` computes it")
    std: list[float] = key([0.229, 0.224, 0.225], "per channel, of pixels scaled to [0, 1]")
    crop_scale: list[float] = key([0.2, 1.0], "share of the image's area that a training crop covers, [least, most]; [1, 1] = no crop")
    flip: bool = key(True, "mirror half of the training images")
    resize: float = key(1.0, "shorter side before the evaluation's centre crop, in image sizes (224 from 256: 1.143)")
    validation: float = key(0.1, "share of the training images held out for choices and for the held-out loss")
    split_seed: int = key(0, "decides which images are held out, and the test images of a source without a test split")
    shuffle: str = key("full", "full | blocks: an epoch mixes all images, or those of about 32 shards at a time (for network disks)")
    damage: float = key(0.001, "share of the images that may be unreadable, shown as others, before the run stops")
    workers: int = key(0, "processes that read and crop; 0 = none")
    decode: str = key("auto", "auto | cpu | gpu: what unpacks JPEGs (a GPU's pixels differ by a level or two); auto = cpu")
    cache: str = key("none", "none | ram | device: decode once and keep the images there (data that fits)")


@dataclass(frozen=True)
class Encoder:
    """Any timm VisionTransformer by name, and what to change in it (null = as the name says)."""

    name: str = key("vit_base_patch16_224", "timm model name; or conv, dense, linear (those take patch_size, embed_dim, depth)")
    from_: str | None = key(None, "ENCODER (run, file, timm:NAME, hf:NAME) to start as, architecture included; null = random weights")
    frozen: bool = key(False, "leave the encoder's weights as they are")
    patch_size: int | None = key(None, "pixels")
    embed_dim: int | None = key(None, "width of a token")
    depth: int | None = key(None, "blocks")
    num_heads: int | None = key(None, "attention heads")
    mlp_ratio: float | None = key(None, "hidden width of a block's MLP over embed_dim")
    qkv_bias: bool | None = key(None, "bias in the attention's projections")
    qk_norm: bool | None = key(None, "normalise queries and keys")
    init_values: float | None = key(None, "initial layer scale")
    class_token: bool | None = key(None, "a CLS token")
    reg_tokens: int | None = key(None, "register tokens")
    no_embed_class: bool | None = key(None, "no position entries for CLS and registers")

    @property
    def overrides(self) -> dict[str, Any]:
        """What is changed in the named architecture."""
        return {k: v for k, v in vars(self).items() if k not in ("name", "from_", "frozen") and v is not None}


@dataclass(frozen=True)
class Optim:
    """How the weights move."""

    name: str = key("adamw", "adamw | muon | lars | sgd")
    base_lr: float = key(1.5e-4, "learning rate per 256 images of global batch")
    weight_decay: float = key(0.05, "of matrices and tokens; vectors are exempt")
    betas: list[float] = key([0.9, 0.95], "Adam's decay rates")
    momentum: float = key(0.9, "of LARS, SGD and Muon")
    warmup_epochs: Any = key("auto", "epochs of linear warm-up; auto = 40, at most 5% of the run")
    min_lr: float = key(0.0, "learning rate at the end of the cosine (absolute)")
    clip: float | None = key(None, "largest gradient norm; null = no clipping")
    layer_decay: float | None = key(None, "learning rate factor a layer, from the head down (fine-tuning)")


@dataclass(frozen=True)
class Train:
    """How long, how large and on what."""

    epochs: float | None = key(None, "passes over the training images")
    steps: int | None = key(None, "optimiser steps (of epochs, steps, minutes the last one given counts)")
    minutes: float | None = key(None, "wall-clock budget; the schedule ends on time")
    batch_size: int = key(256, "images a step over all ranks")
    accumulate: Any = key("auto", "micro-batches a step; auto = 1")
    precision: str = key("auto", "auto | bf16 | fp16 | fp32: of the forward pass; weights and losses stay float32")
    parallel: str = key("auto", "auto | ddp | fsdp: a whole copy of the training state on every rank, or a share of it; auto by its size")
    recompute: Any = key(
        False, "false | selective | true: make activations anew in the backward pass: those of cheap operations, or whole blocks"
    )
    compile: bool = key(False, "torch.compile the method, on a GPU block by block (needs a C++ compiler on CPU)")
    deterministic: bool = key(False, "bit-reproducible CUDA kernels (always so on CPU)")
    ema: float | None = key(None, "decay of an average of the weights, which is then what is kept as the encoder")
    seed: int = key(0, "decides weights, order, crops and masks")
    skip_updates: int = key(3, "updates in a row that may be left out because a loss or gradient is not finite; 0 = stop at the first")
    spike: float | None = key(
        None, "robust deviations above the recent losses' median from which to go back and leave data out; null = warn only"
    )
    check_replicas: int = key(500, "steps between checks that all ranks hold the same weights, to the bit; 0 = before checkpoints only")
    log_every: int = key(20, "steps")
    checkpoint_every: int = key(500, "steps")
    evaluate_every: int = key(0, "steps between held-out losses; 0 = at the end only")
    device: str = key("auto", "auto | cpu | cuda | cuda:N")
    timeout: float = key(10.0, "minutes that ranks wait for one another before they give up")


@dataclass(frozen=True)
class Evaluate:
    """What is measured when training is over."""

    protocols: list[str] = key(["knn", "linear_probe_quick"], "files of configs/evaluation")
    controls: bool = key(True, "measure raw pixels, PCA and the untrained encoder too")


@dataclass(frozen=True)
class Track:
    """Where the figures are mirrored; the run folder's metrics.jsonl is the truth."""

    wandb: str = key("auto", "auto | online | offline | off; auto = online where a key is configured, else off")
    project: str = key("mae", "W&B project")
    group: str | None = key(None, "W&B group; null = the run's name, which links pretrain, probe and fine-tune")
    tags: list[str] = key([], "W&B tags")
    images_every: int = key(0, "steps between reconstruction pictures; 0 = at the end only")
    histograms_every: int = key(0, "steps between histograms of all weights and gradients in W&B; 0 = none")


@dataclass(frozen=True)
class Run:
    """Where the run lives."""

    dir: str | None = key(None, "run folder; null = runs/DATA-METHOD, -sN for seed N > 0")
    keep: int = key(2, "newest checkpoints kept; from 2 on a damaged one has one before it to fall back to")
    keep_every: int | None = key(None, "steps between checkpoints that are kept for good; null = none are")
    background: bool = key(False, "write checkpoints behind the training, which costs their memory a second time")


@dataclass(frozen=True)
class Config:
    """Everything a command needs to know, resolved."""

    data: Data = field(default_factory=Data)
    encoder: Encoder = field(default_factory=Encoder)
    method: dict[str, Any] = field(default_factory=dict)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    protocol: dict[str, Any] = field(default_factory=dict)
    track: Track = field(default_factory=Track)
    run: Run = field(default_factory=Run)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        size = self.data.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dicts and lists, for YAML and JSON; a URL without its secrets."""
        plain = cast(dict[str, dict[str, Any]], OmegaConf.to_container(OmegaConf.structured(self)))
        plain["data"]["path"] = public(plain["data"]["path"])
        return {section: {spelt(k): v for k, v in values.items()} for section, values in plain.items()}


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in fields(Config)}  # the class of each
FOLDER_OF = {"data": "data", "method": "methods", "protocol": "evaluation"}  # sections chosen by name, and where their YAMLs lie
FREE = ("method", "protocol")  # sections whose keys are those of the YAML of their name
