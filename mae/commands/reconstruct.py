"""The story of reconstruct: a picture of what an autoencoder makes of images, a run's own or any others."""

from collections.abc import Sequence
from pathlib import Path

from mae import config
from mae.commands import compare, door, encoders, options
from mae.commands.help import OWN
from mae.commands.whole import check_place
from mae.config import Config
from mae.data.arrays import ARRAYS
from mae.data.decode import DamagedImage
from mae.data.folder import IMAGES
from mae.data.given import source_of
from mae.data.sources import Source, open_splits
from mae.errors import ConfigError

USAGE = """
usage: mae reconstruct ENCODER [IMAGE ... | DIR] [--out FILE.png] [--count N] [section.key=value ...]

Draws N images as they are, as the method is given them, and as it reconstructs them. Without images: held-out ones of the run.
Otherwise the first N of the files, or N of a folder's images. ENCODER: the folder of a run, or a whole MAE from elsewhere, such as
hf:facebook/vit-mae-base, whose decoder comes with it.

A MAE that predicts normalised patches (method.norm_pix) leaves open how bright they are. Two rows say whose mean and deviation they were
given: the visible patches', so that nothing of the answer is in the picture, and the hidden patches' own.

  --count N        whole number, at most 256 (8): images
  --out FILE.png   file (RUN/figures/reconstructions.png; of images that are given reconstructions-given.png)
"""
WORDS = {"data.resize": OWN, "train.device": OWN, "train.precision": OWN}
COUNT, MOST = 8, 256  # images in a row


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=WORDS)


def _story(words: list[str]) -> None:
    _, numbers, texts, rest = options.pick(words, numbers={"count": COUNT}, texts=("out",))
    count = numbers["count"] or COUNT
    if count > MOST:
        raise ConfigError(f"--count {count} is more than a picture has room for: give at most {MOST}")
    named = [word for word in rest if "=" in word and word.partition("=")[0] not in WORDS and _is_image(word)]  # x=1.png is no setting
    arguments, words = config.split_words([word for word in rest if word not in named])
    if not arguments:
        raise ConfigError("reconstructions by which encoder? Give the folder of a run, such as runs/digits-mae, or hf:NAME")
    options.only(words, WORDS, "the encoder")
    found, images = encoders.find(arguments[0]), [*arguments[1:], *named]
    if not images and "name" not in found.base["data"]:
        raise ConfigError(f"reconstructions of which images? {arguments[0]} brings none: name files or a folder")
    kind = "arrays" if found.base["data"].get("name") == "arrays" else "folder"
    other = [f"data.name={kind}", "data.path=.", "data.workers=0", f"data.resize={found.base['data']['resize']}"]
    cfg = encoders.configure([*(other if images else []), *words], found.base)
    target = Path(texts.get("out") or found.home.figures / f"reconstructions{'-given' if images else ''}.png").expanduser()
    if target.suffix != ".png":
        raise ConfigError(f"--out {target} does not end in .png: choose another name for the picture")
    source = _given(images, cfg, count) if images else open_splits(cfg.data).validation
    check_place(target)

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
        pixels, keys = next(subject.batches(at_most(source, count)))
        picture = reconstruction_pictures.draw(subject, pixels, keys)
    write_atomically(target, lambda file: Image.fromarray(picture).save(file, "PNG"))
    page = compare.refresh(found.home.path) if target.parent == found.home.figures and found.home.results.is_file() else None
    if len(images) > count:
        print(f"the first {count} of {len(images)} images: --count {min(len(images), MOST)} draws more")
    for file in [target, *([page] if page is not None else [])]:
        print(file)


def _is_image(word: str) -> bool:
    return word.lower().endswith((*IMAGES.extensions, *ARRAYS.extensions)) or Path(word).expanduser().exists()


def _given(images: list[str], cfg: Config, count: int) -> Source:
    """The first files, or some of a folder's. Raises ConfigError for what is neither, and for a damaged image among them."""
    kind = ARRAYS if cfg.data.name == "arrays" else IMAGES
    if len(images) == 1 and Path(images[0]).expanduser().is_dir():
        from mae.evaluation.reconstruction import at_most

        source = at_most(source_of(images[0], cfg.data.channels, kind=kind), count)
    else:
        if folder := next((image for image in images if Path(image).expanduser().is_dir()), None):
            raise ConfigError(f"{folder} is a folder, and other images are named beside it: give one folder alone, or files")
        source = source_of(images[:count], cfg.data.channels, kind=kind)
    for index in range(len(source)):
        try:
            source.read(index)
        except DamagedImage as error:  # another one would be drawn in its place
            raise ConfigError(f"{error}: repair it or leave it out") from error
    return source
