"""Dimensionality reduction: what a code keeps of the pixels, and whether neighbours stay neighbours.

    R^2 = 1 - |x - reconstruction|^2 / |x - mean training image|^2, summed over the test images

beside that of PCA with as many components, the best that linear codes can do on the training images.
"""

from collections.abc import Sequence

import torch
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch import Tensor

from mae.data.sources import Source
from mae.errors import ConfigError
from mae.evaluation import code_map, neighbourhoods
from mae.evaluation.controls import PIXEL_SIDE
from mae.evaluation.features import encodes_itself
from mae.evaluation.linear_reconstruction import Pairs, pca_errors, ridge_errors
from mae.evaluation.material import Result, draw_order
from mae.evaluation.subject import Subject
from mae.nets.pixels import reduced

VERSION = 1
NEEDS_LABELS = False
OF_MODEL = True


def evaluate(
    subject: Subject,
    *,
    neighbours: int = 10,
    images: int = 5000,
    mapped: int = 1000,
    ridge: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    seed: int = 0,
) -> Result:
    """Trustworthiness, continuity and neighbour recall, shares of 1, and R^2, all in pixels reduced to at most 32 a side.

    `r2` is that of images which the model makes of its code, where it does; `r2_linear` that of a ridge regression from the code to the
    pixels, for any encoder; `..._above_pca` what is left of them over PCA of equal size. Raises ConfigError for too few test images.
    """
    material, splits, device = subject.material, subject.splits, subject.device
    pool = "latent" if "latent" in material.pools else "mean"
    ids = draw_order(len(splits.test_images), seed)[:images].sort().values
    if len(ids) <= 2 * neighbours:
        raise ConfigError(f"{len(ids)} test images are too few for protocol.neighbours={neighbours}: choose fewer than {len(ids) / 2:g}")
    train, validation, test = (
        Pairs(codes[pool].x, _pixels(subject, source))
        for codes, source in (
            (material.train, splits.train),
            (material.validation, splits.validation),
            (material.test, splits.test_images),
        )
    )
    drawn = Pairs(test.codes[ids.to(device)], test.pixels[ids].to(device))
    kept = neighbourhoods.compare(drawn.pixels, drawn.codes, neighbours)
    total = (test.pixels.double() - train.pixels.mean(0, dtype=torch.float64)).square().sum(1)
    of_pca = pca_errors(train.pixels, test.pixels, test.codes.shape[1], device)
    of_ridge, strength = ridge_errors(train, validation, test, ridge, device)
    metrics: dict[str, float] = {}
    for name, values in (("trustworthiness", kept.trustworthiness), ("continuity", kept.continuity), ("recall", kept.recall)):
        metrics |= _ratio(name, values, torch.ones_like(values))
    metrics |= _ratio("r2_linear", total - of_ridge, total) | _ratio("r2_linear_above_pca", of_pca - of_ridge, total)
    size = test.codes.shape[1]
    if _decodes(subject):
        errors, whole = _errors(subject, test.pixels), _decoded_size(subject, size)
        if whole != size:  # a code too large to be taken whole is averaged over its places, but an image is made of all of it
            of_pca = pca_errors(train.pixels, test.pixels, whole, device)
        metrics |= _ratio("r2", total - errors, total) | _ratio("r2_above_pca", of_pca - errors, total) | {"decoded_size": whole}
    metrics |= _ratio("r2_pca", total - of_pca, total)
    metrics |= {"code_size": size, "n_test": len(test.codes), "n_train": len(train.codes), "n_neighbourhoods": len(ids)}
    few, classes = ids[draw_order(len(ids), seed, 1)[:mapped]].to(device), splits.test_images.classes
    labels = material.test[pool].y[few].cpu().numpy() if classes else None
    with threadpool_limits(1):  # the same map however many threads there are
        drawn_map = code_map.draw(test.codes[few].double().cpu().numpy(), labels, classes, seed)
    return Result(metrics, {"ridge": strength}, {"map": drawn_map})


def _pixels(subject: Subject, source: Source) -> Tensor:
    """(N, D) float32 on the CPU."""
    return torch.cat([reduced(images.float(), PIXEL_SIDE).cpu() for images, _ in subject.batches(source)])


def _decodes(subject: Subject) -> bool:
    """Whether the model makes images of the code alone: not one that is shown a part of the image, nor one without a code."""
    model = subject.model
    has_code = hasattr(model, "code") or encodes_itself(model)
    return has_code and hasattr(model, "reconstruct") and not hasattr(model, "predict")


def _decoded_size(subject: Subject, otherwise: int) -> int:
    """How many numbers an image is made of."""
    if not hasattr(subject.model, "code"):
        return otherwise
    images, _ = next(subject.batches(subject.splits.test_images, size=1))
    with subject.reading():
        return subject.model.latent(images).numel()


def _errors(subject: Subject, pixels: Tensor) -> Tensor:
    """Squared errors (N,) of the test images' reconstructions, in reduced pixels (N, D)."""
    with subject.reading():
        batches = subject.batches(subject.splits.test_images)
        made = [reduced(subject.model.reconstruct(images).float(), PIXEL_SIDE).cpu() for images, _ in batches]
    return (torch.cat(made).double() - pixels).square().sum(1)


def _ratio(name: str, over: Tensor, under: Tensor) -> dict[str, float]:
    """sum(over) / sum(under), both (N,), and the 95% half-width of the bootstrap over images, by the delta method."""
    value = over.sum() / under.sum()
    influence = (over - value * under) / under.sum()
    return {name: float(value), f"{name}_ci95": 1.96 * float(influence.square().sum().sqrt())}
