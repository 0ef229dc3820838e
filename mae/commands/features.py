"""The story of features: every image of a folder as a vector, for people who only want those."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from mae import config
from mae.commands import door, encoders, options
from mae.commands.help import OWN
from mae.commands.latents import readable
from mae.commands.whole import check_place
from mae.config import Config
from mae.data.folder import Folder, classes_of, find_images
from mae.errors import ConfigError

if TYPE_CHECKING:  # a wrong path is answered before torch is imported
    import torch

    from mae.methods.base import Autoencoder

USAGE = """
usage: mae features ENCODER DIR --out F.npz [section.key=value ...]

Encodes every image file below DIR, in the order of their paths, and writes F.npz, which numpy.load opens:
  names    (N,)    paths below DIR
  mean     (N, D)  float32, the mean over the patch tokens
  cls      (N, D)  the class token, where the encoder has one
  latent   (N, d)  the method's own code, where it has one
  labels   (N,)    and classes (C,), the names: where every image lies in a class folder, DIR/CLASS/FILE
ENCODER: the folder of a run, a checkpoint file (timm, official MAE, Hugging Face), timm:NAME or hf:NAME. Images are resized, centre-cropped
and normalised as the encoder expects; another data.image_size resamples its positions. Files that cannot be read are left out, by name.
Numbers are computed in bf16 where the machine is fast at it, as when evaluating: train.precision=fp32 gives the same ones anywhere.

  --out F.npz   a new file
"""
WORDS = {"data.image_size": OWN, "data.resize": OWN, "data.workers": "2", "train.device": OWN, "train.precision": OWN}
BATCH = 64


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=WORDS)


def _story(words: list[str]) -> None:
    given, words = options.take(words, "out")
    arguments, words = config.split_words(words)
    if len(arguments) != 2:
        raise ConfigError("say which encoder, which images and where to: mae features ENCODER DIR --out F.npz")
    options.only(words, WORDS, "the encoder")
    root, target = Path(arguments[1]).expanduser(), Path(given["out"]).expanduser()
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder: give the one that holds the images")
    if target.suffix != ".npz" or target.exists():
        raise ConfigError(
            f"{target} {'exists already' if target.exists() else 'does not end in .npz'}: choose another name for the vectors"
        )
    paths = find_images(root)
    if not paths:
        raise ConfigError(f"{root} holds no images, nor do its subfolders: give another folder")
    found = encoders.find(arguments[0])
    own = ["configs/data/folder.yaml", f"data.path={root}", f"data.resize={found.base['data']['resize']}"]
    cfg = encoders.configure([*own, *words], found.base)
    source = Folder(root, paths, classes_of(paths), cfg.data.channels)
    check_place(target)

    from mae.evaluation.features import write_atomically
    from mae.interop.resize import resize
    from mae.training import distributed

    with distributed.start(cfg.train.device) as ranks:
        if not ranks.first:
            return
        model = resize(found.load(), image_size=cfg.image_size, channels=cfg.data.channels).to(ranks.device)
        vectors, left_out = encode(model, source, cfg, ranks.device)
    arrays = vectors | ({"classes": np.array(source.classes)} if source.classes else {})

    def write(file: Path) -> None:
        with file.open("wb") as opened:
            np.savez(opened, **arrays)

    write_atomically(target, write)
    for name in left_out:
        print(f"left out, cannot be read: {name}", file=sys.stderr)
    shapes = ", ".join(f"{name} {' x '.join(map(str, x.shape))}" for name, x in arrays.items())
    print(f"{target}: {shapes}")


def encode(model: "Autoencoder", source: Folder, cfg: Config, device: "torch.device") -> tuple[dict[str, Any], list[str]]:
    """The arrays of the file, without those of damaged images, and the names of these."""
    import torch

    from mae.data.loader import evaluation_batches, normalise
    from mae.evaluation.features import encode_all, evaluating, pools_of
    from mae.nets import precision
    from mae.nets.vit import choose_attention

    choose_attention(model, device)
    kind, pools = precision.choose(cfg.train.precision, device), pools_of(model)
    parts: dict[str, list[Any]] = {}
    left_out: list[str] = []
    batches = evaluation_batches(source, cfg, batch_size=BATCH, device=device)
    with evaluating(model), precision.computing(kind, device), torch.no_grad():
        for batch in tqdm(batches, total=-(-len(source) // BATCH), unit="batch", disable=None):
            ids = batch.ids.tolist()
            # another image stands in the place of a damaged one, under a name that is not its own
            whole = [row for row, number in enumerate(ids) if not batch.replaced or readable(source, number)]
            left_out += [source.name_of(ids[row]) for row in set(range(len(ids))) - set(whole)]
            parts.setdefault("names", []).extend(source.name_of(ids[row]) for row in whole)
            for pool, x in encode_all(model, normalise(batch.images, cfg.data), pools).items():
                parts.setdefault(pool, []).append(x[whole].float().cpu().numpy())
            if source.classes:
                parts.setdefault("labels", []).append(batch.labels[whole].cpu().numpy())
    return {name: np.array(part) if name == "names" else np.concatenate(part) for name, part in parts.items()}, sorted(left_out)
