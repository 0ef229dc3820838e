"""Where an image is unusual: a score for every patch.

A masked autoencoder is asked for every patch while it is hidden: the visible sets of a round are disjoint and cover the image, so
that every patch is hidden equally often (at 75%, in 3 of 4 passes). All images share the masks: what is left is the image's own.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.data.sources import Source
from mae.errors import ConfigError
from mae.evaluation.material import draw_order
from mae.evaluation.subject import Subject
from mae.methods.base import Autoencoder
from mae.nets import sizes, vit

EXACT = 1e-6  # share of the variance: an error below it is nothing but rounding, as that of as many components as pixels


def coverings(patches: int, visible: int, rounds: int, seed: int) -> Tensor:
    """Masks that hide every patch equally often: (passes, patches) int64, each row all patch ids, its first `visible` to be seen.

    With `visible` a divisor of `patches`, each round's visible sets are disjoint. Else they run on from one round into the next,
    and there are as many rounds more as make the last one end with a full set.
    """
    full = visible // math.gcd(patches, visible)
    rounds = math.ceil(rounds / full) * full
    stream = torch.empty(0, dtype=torch.int64)
    for number in range(rounds):
        order = draw_order(patches, seed, number)
        begun = stream[len(stream) - len(stream) % visible :]  # the open set takes others first
        stream = torch.cat([stream, order[torch.isin(order, begun).long().argsort(stable=True)]])
    rows = []
    for number, seen in enumerate(stream.view(-1, visible)):
        order = draw_order(patches, seed, rounds + number)
        rows.append(torch.cat([seen, order[~torch.isin(order, seen)]]))
    return torch.stack(rows)


def reconstruction_error(subject: Subject, source: Source, *, rounds: int, seed: int) -> Tensor:
    """The mean squared error of every patch of a source's images, in its order: (N, P) float32 on the CPU.

    Hidden patches are compared in the units that the method predicts. Raises ConfigError for a model that reconstructs nothing, or
    everything.
    """
    model = subject.model
    if not hasattr(model, "reconstruct"):
        raise ConfigError("the model reconstructs nothing: leave reconstruction out of protocol.scores")
    with subject.reading():
        if hasattr(model, "predict"):
            orders = _orders(subject, rounds, seed)
            return torch.cat([_hidden_error(model, images, orders).cpu() for images, _ in subject.batches(source)])
        errors = torch.cat([_error(model, images, _patch(subject)).cpu() for images, _ in subject.batches(source)])
        images, _ = next(subject.batches(source))
    if errors.mean() < EXACT * images.float().var().item():
        raise ConfigError("the model reconstructs every image exactly: leave reconstruction out of protocol.scores")
    return errors


def reconstructed(subject: Subject, images: Tensor, *, rounds: int, seed: int) -> Tensor:
    """Images (B, C, H, W) as the model makes them, each patch while it is hidden where it hides some (the mean over the passes)."""
    model = subject.model
    with subject.reading():
        if not hasattr(model, "predict"):
            return model.reconstruct(images).float()
        total, grid, patch = torch.zeros(()), model.encoder.patch_embed.grid_size, model.encoder.patch_embed.patch_size
        orders = _orders(subject, rounds, seed)
        for order in orders:
            noise = order.argsort().expand(len(images), -1).float()
            hidden = model.predict(images, noise=noise).hidden[..., None]
            total = total + vit.patchify(model.reconstruct(images, noise=noise), patch).float() * hidden
        times = len(orders) * model.hidden_count / orders.shape[1]
        return vit.unpatchify(total / times, grid, patch)


def patch_features(subject: Subject, source: Source) -> Tensor:
    """The features of every patch of a source's images: (N, P, D) float32 on the CPU. Raises ConfigError where there are none."""
    if not hasattr(subject.model.encoder, "forward_intermediates"):
        raise ConfigError("the model has no features of patches: leave patch_knn out of protocol.scores")
    with subject.reading():
        maps = [subject.model.feature_maps(images)[0].float().cpu() for images, _ in subject.batches(source)]
    return torch.cat(maps).flatten(2).transpose(1, 2)


def enlarged(maps: Tensor, subject: Subject) -> Tensor:
    """Maps (N, P) as images of scores (N, H, W), bilinear between the patches' centres."""
    height, width = subject.config.image_size
    patch = _patch(subject)
    grid = maps.float().unflatten(1, (height // patch[0], width // patch[1]))
    return F.interpolate(grid[:, None], (height, width), mode="bilinear")[:, 0]


def _orders(subject: Subject, rounds: int, seed: int) -> Tensor:
    patches = subject.model.encoder.patch_embed.num_patches
    return coverings(patches, patches - subject.model.hidden_count, rounds, seed).to(subject.device)


def _hidden_error(model: Autoencoder, images: Tensor, orders: Tensor) -> Tensor:
    """(B, N): the mean over those passes in which a patch was hidden."""
    target = model.target(vit.patchify(images, model.encoder.patch_embed.patch_size))
    total, times = torch.zeros(()), torch.zeros(())
    for order in orders:
        prediction, hidden = model.predict(images, noise=order.argsort().expand(len(images), -1).float())
        total = total + (prediction.float() - target).square().mean(2) * hidden
        times = times + hidden.float()
    return (total / times).float()


def _error(model: Autoencoder, images: Tensor, patch: tuple[int, int]) -> Tensor:
    return vit.patchify((model.reconstruct(images).float() - images.float()).square(), patch).mean(2)


def _patch(subject: Subject) -> tuple[int, int]:
    """Of the encoder that is measured, also for its controls, which have none."""
    embed = getattr(subject.model.encoder, "patch_embed", None)
    if embed is not None:
        return embed.patch_size
    side = sizes.patch_size(subject.config.encoder.name, subject.config.encoder.patch_size)
    return side, side
