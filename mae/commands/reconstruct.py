"""The story of reconstruct: a picture of what an autoencoder makes of images, a run's own or any others."""

from collections.abc import Sequence
from pathlib import Path

from mae import config
from mae.commands import door, encoders, options
from mae.data.given import source_of
from mae.data.sources import Source, open_splits
from mae.errors import ConfigError

USAGE = """
usage: mae reconstruct ENCODER [IMAGE ... | DIR] [--out FILE.png] [--count N] [data.resize=X] [train.device=D]

Draws N (8) images as they are, as the method is given them, and as it reconstructs them. Without images: held-out ones of the run.
Otherwise files, or the images of a folder. ENCODER: the folder of a run, or a whole MAE from elsewhere, such as
hf:facebook/vit-mae-base, whose decoder comes with it. --out: default RUN/figures/reconstructions.png, or reconstructions-given.png.

A MAE that predicts normalised patches (method.norm_pix) leaves open how bright they are. Two rows say whose mean and deviation they were
given: the visible patches', so that nothing of the answer is in the picture, and the hidden patches' own.
"""
WORDS = ("data.resize", "train.device", "train.precision")
COUNT = 8


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=False)


def _story(words: list[str]) -> None:
    _, numbers, texts, rest = options.pick(words, numbers={"count": COUNT}, texts=("out",))
    arguments, words = config.split_words(rest)
    if not arguments:
        raise ConfigError("reconstructions by which encoder? Give the folder of a run, such as runs/digits-mae, or hf:NAME")
    options.only(words, WORDS, "the encoder")
    found, images = encoders.find(arguments[0]), arguments[1:]
    if not images and "name" not in found.base["data"]:
        raise ConfigError(f"reconstructions of which images? {arguments[0]} brings none: name files or a folder")
    cfg = encoders.configure([*words, *(["data.name=folder", "data.path=.", "data.workers=0"] if images else [])], found.base)
    target = Path(texts.get("out") or found.home.figures / f"reconstructions{'-given' if images else ''}.png").expanduser()
    if target.suffix != ".png":
        raise ConfigError(f"--out {target} does not end in .png: choose another name for the picture")
    splits = None if images else open_splits(cfg.data)
    source: Source = source_of(images[0] if len(images) == 1 else images, cfg.data.channels) if splits is None else splits.validation

    from PIL import Image

    from mae.data.sources import Splits
    from mae.evaluation import reconstruction_pictures
    from mae.evaluation.features import write_atomically
    from mae.evaluation.reconstruction import at_most
    from mae.evaluation.subject import Subject
    from mae.training import distributed

    with distributed.start(cfg.train.device) as ranks:
        model = found.load().to(ranks.device)
        if not hasattr(model, "reconstruct"):
            raise ConfigError(
                f"{found.name} has no decoder, so that nothing is reconstructed: give the run, or the whole checkpoint, of a MAE"
            )
        subject = Subject(model, cfg, Splits(source, source, source), ranks.device)
        pixels, keys = next(subject.batches(at_most(source, numbers["count"] or COUNT)))
        picture = reconstruction_pictures.draw(subject, pixels, keys)
    write_atomically(target, lambda file: Image.fromarray(picture).save(file, "PNG"))
    print(target)
