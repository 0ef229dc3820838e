"""Is it learning? The held-out reconstruction under fixed masks, beside what needs no learning at all.

A masked autoencoder may sit for a whole run on the mean-image plateau, and its features are then worse than an untrained encoder's.
The share of the variance that it explains on images it never saw tells, long before any probe does.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mae.config import Config
from mae.data.loader import evaluation_batches, normalise
from mae.data.sources import Source, Subset
from mae.evaluation.features import evaluating
from mae.evaluation.material import draw_order
from mae.methods.base import Autoencoder
from mae.nets import keyed, vit

BASELINES = {
    "mean_image": "the mean training image",
    "nearest_patch": "copying the nearest visible patch",
    "mean_colour": "the mean colour of the visible patches near by",
}


class MeanPatches(NamedTuple):
    """The mean over training images at every place."""

    pixels: Tensor  # (N, p * q * C), normalised pixels
    target: Tensor  # (N, p * q * C), in the units that the method predicts


@torch.no_grad()
def mean_patches(model: Autoencoder, source: Source, config: Config, *, device: torch.device | str, limit: int = 2048) -> MeanPatches:
    """The means over `limit` training images, drawn always alike: computed once a run."""
    sums, count = [0.0, 0.0], 0
    for batch in evaluation_batches(_some(source, limit), config, batch_size=256, device=torch.device(device)):
        patches = vit.patchify(normalise(batch.images, config.data), model.encoder.patch_embed.patch_size)
        sums = [total + x.double().sum(0) for total, x in zip(sums, (patches, _target(model, patches)), strict=True)]
        count += len(patches)
    return MeanPatches(*((total / count).float() for total in sums))


@torch.no_grad()
def measure(
    model: Autoencoder, source: Source, config: Config, means: MeanPatches, *, device: torch.device | str, limit: int = 2048, seed: int = 0
) -> tuple[dict[str, float], str | None]:
    """How well the hidden patches of `limit` held-out images are predicted, masks fixed by the seed, and a warning if it is not learning.

    'loss' and 'baseline/...' are mean squared errors in the units that the method predicts (patches normalised each for itself with
    norm_pix); 'explained_variance_target' is 1 - loss / baseline/mean_image, and 'explained_variance' the same for pixels, where
    norm_pix must guess each patch's mean and contrast from its neighbours. A method that hides nothing has none of this: ({}, None).
    """
    if not hasattr(model, "predict"):
        return {}, None
    totals: dict[str, float] = {}
    count = 0
    with evaluating(model):
        for batch in evaluation_batches(_some(source, limit), config, batch_size=256, device=torch.device(device)):
            images = normalise(batch.images, config.data)
            keys = torch.from_numpy(keyed.hash_integers(seed, 0, batch.ids.cpu().numpy())).to(images.device)
            errors, elements = _errors(model, images, keys, means)
            totals = {name: totals.get(name, 0.0) + error for name, error in errors.items()}
            count += elements
    means_of = {name: total / count for name, total in totals.items()}
    metrics = {
        "loss": means_of["prediction"],
        "explained_variance": 1 - means_of["pixels"] / means_of["pixels_mean_image"],
        "explained_variance_target": 1 - means_of["prediction"] / means_of["mean_image"],
    }
    metrics |= {f"baseline/{name}": means_of[name] for name in BASELINES}
    return metrics, _warning(metrics)


def _errors(model: Autoencoder, images: Tensor, keys: Tensor, means: MeanPatches) -> tuple[dict[str, float], int]:
    """Sums of squared errors over all hidden pixels of a batch, and how many those are."""
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
    return sums, int(hidden.sum()) * patches.shape[2]


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


def _some(source: Source, limit: int) -> Source:
    if len(source) <= limit:
        return source
    return Subset(source, draw_order(len(source), 0)[:limit].sort().values.numpy())


def _warning(metrics: dict[str, float]) -> str | None:
    best = min(BASELINES, key=lambda name: metrics[f"baseline/{name}"])
    if metrics["loss"] < metrics[f"baseline/{best}"]:
        return None
    return (
        f"the model has not left the plateau: it predicts held-out patches no better than {BASELINES[best]} "
        f"(error {metrics['loss']:.3f}, {metrics[f'baseline/{best}']:.3f}), so train for more steps or change optim.base_lr"
    )
