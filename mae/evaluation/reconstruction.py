"""Is it learning? The held-out reconstruction under fixed masks, beside what needs no learning at all.

A masked autoencoder may sit for a whole run on the mean-image plateau, and its features are then worse than an untrained encoder's.
The share of the variance that it explains on images it never saw tells, long before any probe does.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mae.config import Config
from mae.data.loader import evaluation_batches, normalise
from mae.data.sources import Source, Splits, Subset
from mae.evaluation.features import evaluating
from mae.evaluation.material import draw_order
from mae.methods.base import Autoencoder
from mae.nets import keyed, vit

BASELINES = {
    "mean_image": "the mean training image",
    "nearest_patch": "copying the nearest visible patch",
    "mean_colour": "the mean colour of the visible patches near by",
}


class Report(NamedTuple):
    """How well held-out images are reconstructed: their hidden patches, or all of them where a method hides none."""

    figures: dict[str, float]
    sentence: str  # what they mean, for a person
    learning: bool  # better than every baseline


class MeanPatches(NamedTuple):
    """The mean over training images at every place."""

    pixels: Tensor  # (N, p * q * C), normalised pixels
    target: Tensor  # (N, p * q * C), in the units that the method predicts


@torch.no_grad()
def held_out(model: Autoencoder, splits: Splits, config: Config, *, device: torch.device | str, limit: int = 1024, seed: int = 0) -> Report:
    """Predicts the hidden patches of `limit` validation images, under masks that only the seed and the image decide.

    'loss' and 'baseline/...' are mean squared errors in the units that the method predicts (patches normalised each for itself with
    norm_pix); 'explained_variance_target' is 1 - loss / baseline/mean_image, and 'explained_variance' the same for pixels, where
    norm_pix must guess each patch's mean and contrast from its neighbours. 'generalisation_gap' is how much more of the target's
    variance is explained on as many training images. A method that hides nothing reconstructs whole images, beside the mean image
    alone; one that reconstructs nothing gets an empty report.
    """
    if not hasattr(model, "reconstruct"):
        return Report({}, "", learning=True)
    with evaluating(model):
        means = _mean_patches(model, _images(splits.train, config, device, limit))
        error, seen = (_mean_errors(model, _images(s, config, device, limit), means, seed) for s in (splits.validation, splits.train))
    figures = {
        "loss": error["prediction"],
        "explained_variance": _explained(error["pixels"], error["pixels_mean_image"]),
        "explained_variance_target": _explained(error["prediction"], error["mean_image"]),
    }
    figures["generalisation_gap"] = _explained(seen["prediction"], seen["mean_image"]) - figures["explained_variance_target"]
    figures |= {f"baseline/{name}": error[name] for name in BASELINES if name in error}
    return _report(figures, "hidden patches" if hasattr(model, "predict") else "the pixels")


def _explained(error: float, variance: float) -> float:
    """The share of the variance that is explained; none where there is none, as of a single training image."""
    return 1 - error / variance if variance else 0.0


def _mean_errors(model: Autoencoder, batches: Iterator[tuple[Tensor, np.ndarray]], means: MeanPatches, seed: int) -> dict[str, float]:
    totals: dict[str, float] = {}
    for images, ids in batches:
        keys = torch.from_numpy(keyed.hash_integers(seed, 0, ids)).to(images.device)
        for name, error in _errors(model, images, keys, means).items():
            totals[name] = totals.get(name, 0.0) + error
    return {name: total / totals["count"] for name, total in totals.items()}


def _images(source: Source, config: Config, device: torch.device | str, limit: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Normalised batches (B, C, H, W) of at most `limit` images, always the same ones, with ids (B,) among these."""
    for batch in evaluation_batches(at_most(source, limit), config, batch_size=256, device=torch.device(device)):
        yield normalise(batch.images, config.data), batch.ids.cpu().numpy()


def at_most(source: Source, limit: int) -> Source:
    """The source, or `limit` of its images, always the same ones."""
    return source if len(source) <= limit else Subset(source, draw_order(len(source), 0)[:limit].sort().values.numpy())


def _mean_patches(model: Autoencoder, batches: Iterator[tuple[Tensor, np.ndarray]]) -> MeanPatches:
    pixels, target, count = torch.zeros(()), torch.zeros(()), 0
    for images, _ in batches:
        patches = vit.patchify(images, model.encoder.patch_embed.patch_size)
        pixels, target = pixels + patches.double().sum(0), target + _target(model, patches).double().sum(0)
        count += len(images)
    return MeanPatches((pixels / count).float(), (target / count).float())


def _errors(model: Autoencoder, images: Tensor, keys: Tensor, means: MeanPatches) -> dict[str, float]:
    """Sums of squared errors over all pixels of a batch that had to be made, and how many those are ('count')."""
    patch, grid = model.encoder.patch_embed.patch_size, model.encoder.patch_embed.grid_size
    patches = vit.patchify(images, patch)  # (B, N, P)
    target = _target(model, patches)
    guesses = {"mean_image": (means.target.expand_as(target), target), "pixels_mean_image": (means.pixels.expand_as(patches), patches)}
    if hasattr(model, "predict"):
        prediction, hidden = model.predict(images, keys=keys)
        pixels = prediction if torch.equal(target, patches) else vit.patchify(model.reconstruct(images, keys=keys), patch)
        guesses["nearest_patch"] = (_nearest(target, hidden, grid), target)
        guesses["mean_colour"] = (_colour(target, hidden, grid, images.shape[1]), target)
    else:
        prediction = pixels = vit.patchify(model.reconstruct(images), patch)
        hidden = torch.ones(patches.shape[:2], dtype=torch.bool, device=images.device)
    guesses |= {"prediction": (prediction, target), "pixels": (pixels, patches)}
    sums = {name: (guess[hidden].double() - truth[hidden]).square().sum().item() for name, (guess, truth) in guesses.items()}
    return sums | {"count": int(hidden.sum()) * patches.shape[2]}


def _nearest(target: Tensor, hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every patch (B, N, P) replaced by the visible one nearest to it."""
    distance = _distances(grid, target.device).masked_fill(hidden[:, None, :], torch.inf)  # (B, N, N)
    return vit.take(target, distance.argmin(2))


def _colour(target: Tensor, hidden: Tensor, grid: tuple[int, int], channels: int) -> Tensor:
    """Every patch (B, N, P) replaced by the mean colour of the visible ones, the near ones counting more."""
    weights = _distances(grid, target.device).clamp(min=0.5) ** -3 * ~hidden[:, None, :]  # (B, N, N)
    colours = target.unflatten(2, (-1, channels)).mean(2)  # (B, N, C)
    mean = weights @ colours / weights.sum(2, keepdim=True)
    return mean.repeat(1, 1, target.shape[2] // channels)


def _distances(grid: tuple[int, int], device: torch.device) -> Tensor:
    """(N, N): how far apart the patches lie, in patches."""
    places = torch.cartesian_prod(*(torch.arange(n, device=device, dtype=torch.float32) for n in grid))
    return torch.cdist(places, places)


def _target(model: Autoencoder, patches: Tensor) -> Tensor:
    return model.target(patches) if hasattr(model, "target") else patches


def _report(figures: dict[str, float], what: str) -> Report:
    best = min((name for name in BASELINES if f"baseline/{name}" in figures), key=lambda name: figures[f"baseline/{name}"])
    error, beside = figures["loss"], figures[f"baseline/{best}"]
    compared = f"error {error:.3f}, {BASELINES[best]} {beside:.3f}"
    if error < beside:
        share = 100 * figures["explained_variance_target"]
        return Report(figures, f"The model explains {share:.0f}% of the variance of {what} on held-out images ({compared}).", True)
    sentence = (
        f"WARNING: the model has not left the plateau: on held-out images it predicts {what} no better than {BASELINES[best]} "
        f"({compared}); train for more steps or change optim.base_lr."
    )
    return Report(figures, sentence, learning=False)
