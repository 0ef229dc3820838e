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
    """How well hidden patches of held-out images are predicted."""

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
    norm_pix must guess each patch's mean and contrast from its neighbours. A method that hides nothing gets an empty report.
    """
    if not hasattr(model, "predict"):
        return Report({}, "", learning=True)
    totals: dict[str, float] = {}
    with evaluating(model):
        means = _mean_patches(model, _images(splits.train, config, device, limit))
        for images, ids in _images(splits.validation, config, device, limit):
            keys = torch.from_numpy(keyed.hash_integers(seed, 0, ids)).to(images.device)
            for name, error in _errors(model, images, keys, means).items():
                totals[name] = totals.get(name, 0.0) + error
    error = {name: total / totals["hidden"] for name, total in totals.items()}
    figures = {
        "loss": error["prediction"],
        "explained_variance": 1 - error["pixels"] / error["pixels_mean_image"],
        "explained_variance_target": 1 - error["prediction"] / error["mean_image"],
    }
    figures |= {f"baseline/{name}": error[name] for name in BASELINES}
    return _report(figures)


def _images(source: Source, config: Config, device: torch.device | str, limit: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Normalised batches (B, C, H, W) of at most `limit` images, always the same ones, with ids (B,) among these."""
    if len(source) > limit:
        source = Subset(source, draw_order(len(source), 0)[:limit].sort().values.numpy())
    for batch in evaluation_batches(source, config, batch_size=256, device=torch.device(device)):
        yield normalise(batch.images, config.data), batch.ids.cpu().numpy()


def _mean_patches(model: Autoencoder, batches: Iterator[tuple[Tensor, np.ndarray]]) -> MeanPatches:
    pixels, target, count = 0.0, 0.0, 0
    for images, _ in batches:
        patches = vit.patchify(images, model.encoder.patch_embed.patch_size)
        pixels, target = pixels + patches.double().sum(0), target + _target(model, patches).double().sum(0)
        count += len(images)
    return MeanPatches((pixels / count).float(), (target / count).float())


def _errors(model: Autoencoder, images: Tensor, keys: Tensor, means: MeanPatches) -> dict[str, float]:
    """Sums of squared errors over all hidden pixels of a batch, and how many those are ('hidden')."""
    patch, grid = model.encoder.patch_embed.patch_size, model.encoder.patch_embed.grid_size
    patches = vit.patchify(images, patch)  # (B, N, P)
    target = _target(model, patches)
    prediction, hidden = model.predict(images, keys=keys)
    pixels = prediction
    if not torch.equal(target, patches):
        pixels = vit.patchify(model.reconstruct(images, keys=keys), patch)
    guesses = {
        "prediction": (prediction, target),
        "mean_image": (means.target.expand_as(target), target),
        "nearest_patch": (_nearest(target, hidden, grid), target),
        "mean_colour": (_colour(target, hidden, grid, images.shape[1]), target),
        "pixels": (pixels, patches),
        "pixels_mean_image": (means.pixels.expand_as(patches), patches),
    }
    sums = {name: (guess[hidden].double() - truth[hidden]).square().sum().item() for name, (guess, truth) in guesses.items()}
    return sums | {"hidden": int(hidden.sum()) * patches.shape[2]}


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


def _report(figures: dict[str, float]) -> Report:
    best = min(BASELINES, key=lambda name: figures[f"baseline/{name}"])
    error, beside = figures["loss"], figures[f"baseline/{best}"]
    compared = f"error {error:.3f}, {BASELINES[best]} {beside:.3f}"
    if error < beside:
        share = 100 * figures["explained_variance_target"]
        return Report(figures, f"The model explains {share:.0f}% of the variance of hidden patches on held-out images ({compared}).", True)
    sentence = (
        f"WARNING: the model has not left the plateau: on held-out images it predicts hidden patches no better than {BASELINES[best]} "
        f"({compared}); train for more steps or change optim.base_lr."
    )
    return Report(figures, sentence, learning=False)
