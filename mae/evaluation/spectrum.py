"""How many dimensions features fill, and how evenly: figures of the spectrum of held-out features, without labels.

RankMe (Garrido et al., arXiv:2210.02885): exp of the entropy of the shares of the singular values of the features, not centred.
Effective rank (Roy & Vetterli, EUSIPCO 2007): the same of the eigenvalues of their covariance.
alpha (Agrawal et al., alpha-ReQ, arXiv:2202.05808): the exponent of the power law lambda_i ~ i^-alpha that fits the covariance's spectrum.
They compare runs of ONE method and width; between methods a larger rank is not a better encoder.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from mae.errors import ConfigError
from mae.evaluation.canvas import blank, rendered
from mae.evaluation.jackknife import deviations
from mae.evaluation.material import Material, Result, draw_order
from mae.methods.base import covariance_spectrum, entropy_rank

VERSION = 1
NEEDS_LABELS = False

FEWEST = 4  # images: two in each half that a standard error is drawn from
FIRST, LAST = 3, 100  # ranks that the power law is fitted to: the first ones are few and large, the last ones noise
FLOOR = 1e-10  # of the largest eigenvalue: below it float32 features have only rounding
TINY = 1e-300  # nothing at all passes for a variance


def evaluate(material: Material, *, images: int = 10000, draws: int = 5, seed: int = 0) -> Result:
    """`rankme`, `effective_rank`, `alpha` and its fit's `alpha_r2` on at most `images` test images, for every pool (`rankme_cls` ...).

    Beside each stands `..._std`, its standard error over images, from `draws` halves of them. The picture `spectrum` is log-log. Raises
    ConfigError for too few images.
    """
    if len(material.testing("mean").x) < FEWEST:
        raise ConfigError(f"{len(material.testing('mean').x)} test images vary in nearly no direction: give at least {FEWEST}")
    metrics: dict[str, float] = {}
    spectra = {}
    for pool in material.pools:
        x = material.testing(pool).x
        x = x[draw_order(len(x), seed)[:images].sort().values.to(x.device)].double()
        spectra[pool] = covariance_spectrum(x)
        metrics |= figures(x, pool, spectra[pool])
        metrics |= deviations(partial(_of_some, x, pool), len(x), draws=draws, seed=seed)
    return Result(metrics | {"n_test": len(x)}, {}, {"spectrum": _picture(spectra, metrics)})


def _of_some(x: Tensor, pool: str, ids: Tensor) -> dict[str, float]:
    return figures(x[ids.to(x.device)], pool)


def figures(x: Tensor, pool: str = "mean", spectrum: Tensor | None = None) -> dict[str, float]:
    """RankMe, effective rank and alpha of a pool's features (N, D); `spectrum` is their covariance's, where it is known already."""
    spectrum = covariance_spectrum(x) if spectrum is None else spectrum
    alpha, _, r2 = power_law(spectrum)
    found = {"rankme": rankme(x), "effective_rank": entropy_rank(spectrum), "alpha": alpha, "alpha_r2": r2}
    return {name + _suffix(pool): figure for name, figure in found.items()}


def rankme(x: Tensor) -> float:
    """exp(-sum p log p), p = singular values of features (N, D) over their sum: from 1 to min(N, D); 0 where all are zero."""
    x = x.double()
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    return entropy_rank(torch.linalg.eigvalsh(gram).clamp(min=0).sqrt())


def power_law(spectrum: Tensor) -> tuple[float, float, float]:
    """(alpha, c, r2) of lambda_i = c i^-alpha, fitted to log lambda on log i over ranks 3 to 100 with weights 1/i, which give every
    octave of ranks the same say (Stringer et al., Nature 571, 2019, whose fit alpha-ReQ takes).

    `spectrum` (D,) in any order. Zeros where fewer than three eigenvalues are in that range.
    """
    values = spectrum.double().sort(descending=True).values.cpu().numpy()
    ranks = np.arange(1, len(values) + 1)
    used = (ranks >= FIRST) & (ranks <= LAST) & (values > FLOOR * max(values[0], TINY))
    if used.sum() < 3:
        return 0.0, 0.0, 0.0
    x, y, weight = np.log(ranks[used]), np.log(values[used]), 1 / ranks[used]
    centre, level = np.average(x, weights=weight), np.average(y, weights=weight)
    slope = np.average((x - centre) * (y - level), weights=weight) / np.average((x - centre) ** 2, weights=weight)
    residual = np.average((y - level - slope * (x - centre)) ** 2, weights=weight)
    spread = np.average((y - level) ** 2, weights=weight)
    return float(-slope), float(np.exp(level - slope * centre)), float(1 - residual / spread) if spread > 1e-12 else 1.0


def _suffix(pool: str) -> str:
    return "" if pool == "mean" else f"_{pool}"


def _picture(spectra: Mapping[str, Tensor], metrics: Mapping[str, float]) -> np.ndarray:
    figure = blank(5.0, 3.6)
    axes = figure.add_subplot()
    for colour, (pool, spectrum) in enumerate(spectra.items()):
        values = spectrum.flip(0).cpu().numpy()
        values = values[values > FLOOR * max(values[0], TINY)]
        label = f"{pool}: RankMe {metrics['rankme' + _suffix(pool)]:.1f}, alpha {metrics['alpha' + _suffix(pool)]:.2f}"
        axes.loglog(np.arange(1, len(values) + 1), values, color=f"C{colour}", marker=".", markersize=3, linewidth=1, label=label)
        alpha, c, _ = power_law(spectrum)
        if c:
            fitted = np.array([FIRST, min(LAST, len(values))])
            axes.loglog(fitted, c * fitted**-alpha, color=f"C{colour}", linestyle="--", linewidth=1)
    axes.set(xlabel="rank of the eigenvalue", ylabel="variance", title="Covariance spectrum of held-out features")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return rendered(figure)
