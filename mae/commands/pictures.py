"""The pictures of a run: what its method makes of held-out images, what its encoder sees in them, how it learnt; and `mae pictures`."""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mae import config as configuration
from mae.commands import door, encoders
from mae.commands.help import OWN
from mae.config import Config
from mae.data.sources import Splits, open_splits
from mae.errors import ConfigError, Preempted

log = logging.getLogger("mae")

USAGE = """
usage: mae pictures RUN [section.key=value ...]

Draws RUN/figures/ anew, and RUN/report.html with it, from held-out images:
  reconstructions   input, what is visible, what is made of it
  attention         where the last block's class token looks, as a mean over heads and head by head (a ViT)
  neighbours        the training images nearest to held-out ones by the encoder's features
  samples           images from the prior (for a vq_vae a prior over its codes is fitted first)
  interpolations    from one image to another
  latent_walk       one number of the code at a time
  atoms             the images that most activate each atom of a sparse dictionary
  curves            loss, explained variance and probes over the run
where the method has them. `mae reconstruct` takes other images and other encoders.
"""
PICTURED, ATOMS = 8, 6  # images in a row; rows of a dictionary
LOOKED_THROUGH = 512  # held-out images, for those that activate an atom and those whose codes are walked along


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys={"data.path": OWN, "train.device": OWN})


def _story(words: list[str]) -> None:
    arguments, words = configuration.split_words(words)
    if len(arguments) != 1:
        raise ConfigError("pictures of which run? Give its folder, such as runs/digits-mae")
    folder = encoders.run_folder(Path(arguments[0]))
    cfg = configuration.load(words, base=folder.config())
    splits = open_splits(cfg.data)

    import torch

    import mae
    from mae.commands import compare
    from mae.data.batch import normalise
    from mae.data.loader import evaluation_batches
    from mae.training import distributed

    with distributed.start(cfg.train.device) as ranks:
        method: Any = mae.load(folder.path).to(ranks.device)  # asked by name for what it has
        if hasattr(method, "fit_prior"):
            batches = evaluation_batches(splits.train, cfg, batch_size=256, device=ranks.device)
            with torch.enable_grad():
                nats = method.fit_prior((normalise(b.images, cfg.data), b.keys) for b in batches)
            print(f"prior over the codes fitted: {nats:.2f} nats a code")
        drawn = [*draw(method, splits, cfg, ranks.device, folder.figures), *curves(folder.rows(), folder.path)]
    page = compare.refresh(folder.path) if folder.results.is_file() else None
    for file in [*drawn, *([page] if page is not None else [])]:
        print(file)


def draw(method: Any, splits: Splits, config: Config, device: Any, folder: Path, *, training: bool = False) -> list[Path]:
    """Every picture that the method and its encoder can make, as PNG files in the folder; while `training` only those that cost little.

    One that fails is logged and left out.
    """
    import torch
    from PIL import Image
    from timm.models.vision_transformer import VisionTransformer

    from mae.evaluation import attention_pictures, generation, generation_pictures, neighbour_pictures, reconstruction_pictures
    from mae.evaluation.features import encodes_itself
    from mae.evaluation.reconstruction import at_most
    from mae.evaluation.subject import Subject

    held_out, subject = splits.validation, Subject(method, config, splits, device)
    code = generation.code_of(method)

    @functools.cache
    def few() -> tuple[Any, Any]:
        """Images (N, C, H, W), normalised, and their keys (N,)."""
        return next(subject.batches(at_most(held_out, PICTURED)))

    def many() -> list[Any]:
        return list(subject.batches(at_most(held_out, LOOKED_THROUGH)))

    pictures: dict[str, Callable[[], Any]] = {}
    if hasattr(method, "reconstruct"):
        pictures["reconstructions"] = lambda: reconstruction_pictures.draw(subject, *few())
    if hasattr(method, "sample") and getattr(method, "prior_steps", True):  # 0: a prior that is yet to be fitted
        pictures["samples"] = lambda: generation_pictures.samples(subject, {"prior": method.sample(36)})
    if hasattr(method, "interpolate") and len(held_out) > 1:
        pictures["interpolations"] = lambda: _interpolations(subject, few()[0])
    if hasattr(method, "top_images"):
        pictures["atoms"] = lambda: _atoms(subject, many())
    if isinstance(method.encoder, VisionTransformer) and not encodes_itself(method) and not training:
        pictures["attention"] = lambda: attention_pictures.draw(subject, few()[0])
    if not training:
        pictures["neighbours"] = lambda: neighbour_pictures.draw(subject)
    if code is not None and not training:
        pictures["latent_walk"] = lambda: generation_pictures.walks(subject, torch.cat([code(part).float() for part, _ in many()]))

    def save(picture: Callable[[], Any], file: Path) -> None:
        """Draws it first."""
        with subject.reading():
            Image.fromarray(picture()).save(file, "PNG")

    files = {folder / f"{name}.png": picture for name, picture in pictures.items()}
    return [file for file, picture in files.items() if written(file, functools.partial(save, picture))]


def written(file: Path, write: Callable[[Path], object]) -> bool:
    """Draws and writes a picture, whole or not at all; says whether that could be done: what was trained is worth more than a picture."""
    from mae.evaluation.features import write_atomically

    try:
        write_atomically(file, write)
    except Preempted:
        raise
    except Exception as error:
        log.warning("%s is not drawn: %s: %s", file, type(error).__name__, error)
        return False
    return True


def curves(rows: Sequence[Any], run: Path) -> list[Path]:
    """figures/curves.png of the run, from its rows of metrics.jsonl; nothing where too little was logged."""
    from mae.reporting import curves as reporting

    figure, file = reporting.figure(rows, run.resolve().name), run / "figures" / "curves.png"
    return [file] if figure is not None and written(file, functools.partial(figure.savefig, format="png")) else []


def _interpolations(subject: Any, images: Any) -> Any:
    from mae.evaluation import canvas, drawing

    half = min(len(images) // 2, 3)
    steps = subject.model.interpolate(images[:half], images[half : 2 * half], PICTURED)
    rows = [(f"pair {i + 1}", canvas.colours(row, subject.config)) for i, row in enumerate(steps)]
    caption = canvas.captioned("from one image to another along a straight line between their codes", subject.config)
    return drawing.image_rows(rows, caption=caption, size=1.0)


def _atoms(subject: Any, batches: list[Any]) -> Any:
    from mae.evaluation import canvas, drawing

    model, held_out = subject.model, sum(len(images) for images, _ in batches)
    found = model.top_images(batches, atoms=min(ATOMS, model.dictionary.units), count=min(PICTURED, held_out))
    rows = [(f"atom {int(a)}", canvas.colours(row, subject.config)) for a, row in zip(found.atoms, found.images, strict=True)]
    (height, width), columns = model.encoder.patch_embed.patch_size, model.encoder.patch_embed.grid_size[1]
    boxes = {
        (i, j): (place // columns * height, place % columns * width, height, width)
        for i, row in enumerate(found.places.tolist())
        for j, place in enumerate(row)
    }
    caption = canvas.captioned("held-out images that most activate each atom, by the patch that is framed", subject.config)
    return drawing.image_rows(rows, caption=caption, size=1.0, boxes=boxes)
