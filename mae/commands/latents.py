"""The story of latents: every image of a folder as the code of a trained autoencoder, in tar shards that a diffusion model reads."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mae import config
from mae.commands import door, encoders, options
from mae.commands.help import OWN
from mae.commands.whole import whole_or_not
from mae.config import Config
from mae.data.decode import DamagedImage
from mae.data.sources import Source, Subset, open_parts
from mae.data.write import keys_of
from mae.errors import ConfigError
from mae.training.run import RunFolder

if TYPE_CHECKING:  # a wrong path is answered before torch is imported
    import torch
    from torch import Tensor

    from mae.methods.base import Autoencoder

USAGE = """
usage: mae latents RUN SRC DST [section.key=value ...]

Encodes all images of SRC, a folder of image files or of tar shards, with the autoencoder of a run (kl_ae, or any with a code for
every place) and makes the folder DST:
  latents-000000.tar ...  KEY.npy, float32 (c, h, w) of about unit variance, and KEY.cls where the images have classes; KEY is the
                          image's path without its extension. train-, validation- and test- where SRC holds these splits
  index.json              the run, the scale, the shape, the classes, the shards
Images are resized and centre-cropped as the run evaluates them. `mae.load(RUN).decode_latents(batch)` turns latents of a kl_ae into images;
a latent divided by the scale is the code as the method made it.
"""
WORDS = {"data.workers": OWN, "data.resize": OWN, "train.device": OWN}
BATCH = 64
SHARD = 10_000  # latents in a shard
MEASURED = 1024  # images that decide the scale of a method that keeps none


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=WORDS)


def _story(words: list[str]) -> None:
    folder, target, cfg = _configure(words)
    sources = sources_of(cfg)

    import mae
    from mae.nets.products import wide_products
    from mae.nets.vit import choose_attention
    from mae.training import distributed

    with distributed.start(cfg.train.device) as ranks, wide_products(ranks.device):
        if not ranks.first:
            return
        method = mae.load(folder.path).to(ranks.device)
        choose_attention(method, ranks.device)
        encode, scale = code_maps(method, next(iter(sources.values())), cfg, ranks.device)
        with whole_or_not(target) as unfinished:
            index = {"run": folder.path.name, "method": cfg.method["name"], "scale": scale}
            index |= _write(sources, cfg, encode, unfinished, ranks.device)
            (unfinished / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    shape = " x ".join(map(str, index["shape"]))
    left_out = f", {len(index['left_out'])} damaged images left out" if index["left_out"] else ""
    print(f"{target}: {index['count']:,} latents of {shape}, scale {scale:.4g}{left_out}")


def _configure(words: list[str]) -> tuple[RunFolder, Path, Config]:
    """The run, the folder to make, and the run's configuration with SRC as its data."""
    arguments, words = config.split_words(words)
    if len(arguments) != 3:
        raise ConfigError("say which run, which images and where to: mae latents RUN SRC DST")
    options.only(words, WORDS, "the run")
    folder = encoders.run_folder(Path(arguments[0]))
    source, target = (Path(word).expanduser() for word in arguments[1:])
    if not source.is_dir():
        raise ConfigError(f"{source} is no folder: give the one that holds the images or the tar shards")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already: choose another folder for the latents, or remove it")
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies inside {source}, whose images it would join: choose a folder elsewhere")
    cfg = config.load(words, base=folder.config())
    name = cfg.data.name if cfg.data.name == "arrays" else "shards" if next(source.rglob("*.tar"), None) else "folder"
    return folder, target, dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, name=name, path=str(source), cache="none"))


def sources_of(cfg: Config) -> dict[str, Source]:
    """All images of `data.path`, by the splits that lie there; a share that only a training run would hold out is no split."""
    train, validation, test = open_parts(cfg.data)
    if isinstance(train, Subset):
        return {"latents": train.source}
    return {name: part for name, part in (("train", train), ("validation", validation), ("test", test)) if part is not None}


def code_maps(method: "Autoencoder", source: Source, cfg: Config, device: "torch.device") -> tuple[Callable[["Tensor"], "Tensor"], float]:
    """(images (B, C, H, W) -> scaled codes (B, c, h, w), their scale: 1 / std).

    A method that keeps no scale of its own gets it from some of these images. Raises ConfigError for one without a code at every place.
    """
    import torch
    from einops import rearrange

    from mae.data.loader import evaluation_batches, normalise

    own: Any = method
    if hasattr(own, "latents_for_diffusion"):
        return own.latents_for_diffusion, float(own.scale_factor)
    places = method.encoder.patch_embed
    code: Callable[[Tensor], Tensor] = getattr(method, "latent", lambda images: images)
    with torch.no_grad():
        shape = code(torch.zeros(1, cfg.data.channels, *cfg.image_size, device=device)).shape
        if len(shape) != 3 or shape[1] != places.num_patches:
            raise ConfigError(f"method {cfg.method['name']} of this run has no code for every place: train configs/methods/kl_ae.yaml")
        spread = np.unique(np.linspace(0, len(source) - 1, MEASURED).astype(np.int64))
        batches = evaluation_batches(Subset(source, spread), cfg, batch_size=BATCH, device=device)
        scale = 1 / float(torch.cat([code(normalise(batch.images, cfg.data)).float() for batch in batches]).std().clamp(min=1e-6))
    return lambda images: scale * rearrange(code(images).float(), "b (h w) c -> b c h w", h=places.grid_size[0]), scale


def _write(
    sources: dict[str, Source], cfg: Config, encode: Callable[["Tensor"], "Tensor"], folder: Path, device: "torch.device"
) -> dict[str, Any]:
    """Writes the shards of all splits; returns what index.json says of them."""
    from webdataset import ShardWriter

    shape: tuple[int, ...] = ()
    left_out: list[str] = []
    splits: dict[str, dict[str, Any]] = {}
    for split, source in sources.items():
        shards: list[str] = []
        keys, count = keys_of(source), 0
        pattern = f"{str(folder.resolve()).replace('%', '%%')}/{split}-%06d.tar"
        # pax: names of any length; no time of day: the same latents, the same bytes
        with ShardWriter(pattern, maxcount=SHARD, verbose=0, post=shards.append, format="PAX_FORMAT", mtime=0) as writer:
            for number, label, latent in _latents(source, cfg, encode, device, left_out):
                sample = {"__key__": keys[number], "npy": latent}
                writer.write(sample if label < 0 else sample | {"cls": label})
                shape, count = latent.shape, count + 1
        splits[split] = {"count": count, "shards": [Path(shard).name for shard in shards]}
    total = sum(split["count"] for split in splits.values())
    classes = next(iter(sources.values())).classes
    return {"shape": list(shape), "dtype": "float32", "count": total, "splits": splits, "classes": classes, "left_out": left_out}


def _latents(
    source: Source, cfg: Config, encode: Callable[["Tensor"], "Tensor"], device: "torch.device", left_out: list[str]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(position, label, latent) of every image that can be read; the names of the others go to `left_out`."""
    import torch

    from mae.data.loader import evaluation_batches, normalise

    for batch in evaluation_batches(source, cfg, batch_size=BATCH, device=device):
        with torch.no_grad():
            latents = encode(normalise(batch.images, cfg.data)).float().cpu().numpy()
        for number, label, latent in zip(batch.ids.tolist(), batch.labels.tolist(), latents, strict=True):
            if batch.replaced and not readable(source, number):  # another image stands there, under a name that is not its own
                left_out.append(source.name_of(number))
            else:
                yield number, label, latent


def readable(source: Source, number: int) -> bool:
    """Whether an image of a source is whole."""
    try:
        source.read(number)
    except DamagedImage:
        return False
    return True
