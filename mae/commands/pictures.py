"""The pictures of a run: reconstructions, and what its method can draw besides; and the story of `mae pictures`, which draws them anew."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mae import config as configuration
from mae.commands import door, encoders
from mae.config import Config
from mae.data.sources import Splits, open_splits
from mae.errors import ConfigError

USAGE = """
usage: mae pictures RUN [train.device=D]

Draws RUN/figures/: reconstructions of held-out images; samples from the prior and interpolations where the method has them (for a
vq_vae a prior over its codes is fitted first); the images that most activate each atom of a sparse dictionary.
"""
PICTURED = 8  # images in a row
LOOKED_THROUGH = 512  # held-out images, for those that activate an atom


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words)


def _story(words: list[str]) -> None:
    arguments, words = configuration.split_words(words)
    if len(arguments) != 1:
        raise ConfigError("pictures of which run? Give its folder, such as runs/digits-mae")
    folder = encoders.run_folder(Path(arguments[0]))
    cfg = configuration.load(words, base=folder.config())
    splits = open_splits(cfg.data)

    import torch

    import mae
    from mae.data.batch import normalise
    from mae.data.loader import evaluation_batches
    from mae.training import distributed

    with distributed.start(cfg.train.device) as ranks, torch.no_grad():
        method = mae.load(folder.path).to(ranks.device)
        if hasattr(method, "fit_prior"):
            batches = evaluation_batches(splits.train, cfg, batch_size=256, device=ranks.device)
            with torch.enable_grad():
                nats = method.fit_prior((normalise(b.images, cfg.data), b.keys) for b in batches)
            print(f"prior over the codes fitted: {nats:.2f} nats a code")
        for file in draw(method, splits, cfg, ranks.device, folder.figures):
            print(file)


def draw(method: Any, splits: Splits, config: Config, device: Any, folder: Path) -> list[Path]:
    """Every picture that the method can make, as PNG files in the folder, from a few held-out images."""
    import torch

    from mae.data.batch import normalise
    from mae.data.loader import evaluation_batches
    from mae.evaluation.reconstruction import at_most

    source = at_most(splits.validation, LOOKED_THROUGH)
    batches = [(normalise(b.images, config.data), b.keys) for b in evaluation_batches(source, config, batch_size=256, device=device)]
    images, keys = (part[:PICTURED] for part in batches[0])
    pictures: dict[str, Callable[[], tuple[dict[str, Any], str] | None]] = {}
    if hasattr(method, "reconstruct"):
        pictures["reconstructions"] = lambda: _reconstructions(method, images, keys)
    if hasattr(method, "sample") and getattr(method, "prior_steps", 1):  # 0: a prior that is yet to be fitted
        pictures["samples"] = lambda: ({f"{i * PICTURED + 1} ...": part for i, part in enumerate(method.sample(24).split(PICTURED))}, "")
    if hasattr(method, "interpolate"):
        pictures["interpolations"] = lambda: _interpolations(method, images)
    if hasattr(method, "top_images"):
        pictures["atoms"] = lambda: _atoms(method, batches)
    files = []
    with torch.no_grad():
        for name, rows_of in pictures.items():
            files.append(_grid(*rows_of(), folder / f"{name}.png", config))
    return files


def _reconstructions(method: Any, images: Any, keys: Any) -> tuple[dict[str, Any], str]:
    if hasattr(method, "visible"):
        rows = {"input": images, "visible": method.visible(images, keys=keys), "reconstruction": method.reconstruct(images, keys=keys)}
        return rows, "hidden patches un-normalised with the statistics of the visible ones" if method.norm_pix else ""
    if hasattr(method, "corrupt"):
        corrupted = method.corrupt(images, keys=keys)
        return {"input": images, "corrupted": corrupted, "reconstruction": method.reconstruct(corrupted)}, ""
    return {"input": images, "reconstruction": method.reconstruct(images)}, ""


def _interpolations(method: Any, images: Any) -> tuple[dict[str, Any], str]:
    half = min(len(images) // 2, 3)
    steps = method.interpolate(images[:half], images[half : 2 * half], PICTURED)
    return {f"pair {i + 1}": row for i, row in enumerate(steps)}, "from one image to another along a straight line between their codes"


def _atoms(method: Any, batches: list) -> tuple[dict[str, Any], str]:
    found = method.top_images(batches, atoms=6, count=PICTURED)
    return {f"atom {int(a)}": row for a, row in zip(found.atoms, found.images, strict=True)}, "held-out images that most activate each atom"


def _grid(rows: dict[str, Any], caption: str, file: Path, config: Config) -> Path:
    """Draws rows of normalised images (N, C, H, W)."""
    import torch

    from mae.reporting import figures

    def pixels(images: Any) -> Any:
        mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (config.data.mean, config.data.std))
        return (images.float() * std + mean).permute(0, 2, 3, 1).cpu().numpy()

    figures.image_grid({name: pixels(images) for name, images in rows.items()}, file, caption=caption)
    return file
