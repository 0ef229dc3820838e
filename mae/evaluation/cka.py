"""How alike two representations of the same images are, up to a rotation and a scale: debiased linear CKA.

Kornblith et al., arXiv:1905.00414, with the unbiased HSIC_1 of Song et al., JMLR 13 (2012), eq. 5, in the place of the biased one, which
calls independent features alike wherever they have more dimensions than there are images. Nguyen et al., arXiv:2010.15327, average
HSIC_1 over minibatches because the kernel matrices of many images do not fit; for the linear kernel none is needed, see hsic.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from mae.data.sources import Source
from mae.errors import ConfigError
from mae.evaluation import layers
from mae.evaluation.canvas import blank, rendered
from mae.evaluation.controls import PIXEL_SIDE
from mae.evaluation.features import layer_name, pass_over
from mae.evaluation.jackknife import deviations
from mae.evaluation.material import Features, Result
from mae.evaluation.reconstruction import at_most
from mae.evaluation.subject import Subject
from mae.nets.pixels import reduced

VERSION = 1
NEEDS_LABELS = False
OF_MODEL = True


def evaluate(subject: Subject, *, beside: str | None = None, images: int = 5000, draws: int = 5, seed: int = 0) -> Result:
    """With `beside`, another ENCODER: `cka` of the two encoders' mean-pooled features, and `cka_layerN` of this one's after N blocks with
    the other's last. Without: `cka_pixels` of the encoder's features with raw pixels, and `cka_layerN` and `pixels_layerN` of the
    mean-pooled features after N blocks with the last block's and with pixels. On at most `images` test images.

    Beside each stands `..._std`, its standard error over images, from `draws` halves of them. The picture shows every pair. Raises
    ConfigError for an encoder without blocks, and for fewer than 8 test images.
    """
    depth, source = layers.depth_of(subject), at_most(subject.splits.test_images, images)
    if len(source) < 8:
        raise ConfigError(f"{len(source)} test images are too few for CKA, whose standard error comes from halves of at least 4")
    blocks = layers.features(subject, source, range(1, depth + 1), ("mean",))
    if beside is not None:
        return _of_two(subject.beside(beside), blocks, source, beside, draws, seed)
    pixels = pass_over(source, subject.config, lambda batch: {"pixels": reduced(batch, PIXEL_SIDE)}, device=subject.device)
    names = [layer_name(layer, "mean") for layer in range(1, depth + 1)]
    x = {name: f.x.to(subject.device).double() for name, f in (pixels | blocks).items()}
    own = {name: hsic(f, f) for name, f in x.items()}
    table = {(a, b): _ratio(hsic(x[a], x[b]), own[a], own[b]) for i, a in enumerate(x) for b in list(x)[i:]}
    metrics = {"cka_pixels": table["pixels", names[-1]]}
    metrics |= {f"cka_{name}": table[name, names[-1]] for name in names[:-1]} | {f"pixels_{name}": table["pixels", name] for name in names}

    def of_some(ids: Tensor) -> dict[str, float]:
        some = {name: f[ids.to(f.device)] for name, f in x.items()}
        last, raw = some[names[-1]], some["pixels"]
        found = {f"cka_{name}": debiased_cka(some[name], last) for name in ("pixels", *names[:-1])}
        return found | {f"pixels_{name}": debiased_cka(some[name], raw) for name in names}

    metrics |= deviations(of_some, len(source), draws=draws, seed=seed)
    return Result(metrics | {"n_test": len(source)}, {}, {"layers": _picture(table, list(x), list(x))})


def _of_two(other: Subject, blocks: dict[str, Features], source: Source, name: str, draws: int, seed: int) -> Result:
    """This encoder's blocks against the blocks of another one on the same images."""
    beside = layers.features(other, source, range(1, layers.depth_of(other) + 1), ("mean",))
    ours, theirs = ({name: f.x.to(other.device).double() for name, f in side.items()} for side in (blocks, beside))
    own, their_own = ({name: hsic(f, f) for name, f in side.items()} for side in (ours, theirs))
    table = {(a, b): _ratio(hsic(ours[a], theirs[b]), own[a], their_own[b]) for a in ours for b in theirs}
    last, their_last = list(ours)[-1], list(theirs)[-1]

    def figures(ids: Tensor) -> dict[str, float]:
        rows = ids.to(other.device)
        found = {"cka": debiased_cka(ours[last][rows], theirs[their_last][rows])}
        return found | {f"cka_{a}": debiased_cka(f[rows], theirs[their_last][rows]) for a, f in ours.items() if a != last}

    metrics = {"cka": table[last, their_last]} | {f"cka_{a}": table[a, their_last] for a in ours if a != last}
    metrics |= deviations(figures, len(source), draws=draws, seed=seed)
    picture = _picture(table, list(ours), list(theirs), label=f"blocks of {name}")
    return Result(metrics | {"n_test": len(source)}, {}, {"beside": picture})


def debiased_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of features (N, D) and (N, E) of the same N >= 4 images, in the same order.

    1 for the same features, however rotated and scaled; 0 on average for independent ones (so that a single value may lie below);
    0 where one of them does not vary.
    """
    x, y = x.double(), y.double()
    return _ratio(hsic(x, y), hsic(x, x), hsic(y, y))


def hsic(x: Tensor, y: Tensor) -> float:
    """HSIC_1 of linear kernels of x (N, D) and y (N, E), float64: Song et al., eq. 5, without bias.

    The estimator sees no shift, and for centred features the rows of K = x x' sum to zero, so that with a_i = |x_i|^2, b_i = |y_i|^2 its
    three terms become tr(KL) - sum ab, sum a sum b and sum ab: linear in the number of images where that exceeds their dimensions.
    """
    n = len(x)
    x, y = x - x.mean(0), y - y.mean(0)
    a, b = x.square().sum(1), y.square().sum(1)
    trace = (x.T @ y).square().sum() if min(x.shape[1], y.shape[1]) <= n else ((x @ x.T) * (y @ y.T)).sum()
    total = trace - n / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))
    return float(total) / (n * (n - 3))


def _ratio(both: float, one: float, other: float) -> float:
    return both / (one * other) ** 0.5 if one > 0 and other > 0 else 0.0


def _picture(
    table: Mapping[tuple[str, str], float], rows: list[str], columns: list[str], *, label: str = "after so many blocks"
) -> np.ndarray:
    values = np.array([[table.get((a, b), table.get((b, a))) for b in columns] for a in rows], float)
    figure = blank(4.8, 4.0)
    axes = figure.add_subplot()
    shown = axes.imshow(values, vmin=0, vmax=1, cmap="magma", origin="lower")
    axes.set(xticks=range(len(columns)), yticks=range(len(rows)), xlabel=label, title="Debiased CKA of the layers")
    axes.set_xticklabels([name.removeprefix("layer") for name in columns], rotation=90 if len(columns) > 8 else 0, fontsize=8)
    axes.set_yticklabels([name.removeprefix("layer") for name in rows], fontsize=8)
    figure.colorbar(shown, ax=axes)
    return rendered(figure)
