"""Disentanglement: does each number of the code stand for one factor of the image, and each factor for one number?

MIG: Chen et al., arXiv:1802.04942, equation 6. DCI: Eastwood & Williams, ICLR 2018. SAP: Kumar et al., arXiv:1711.00848, section 3.
FactorVAE score: Kim & Mollon, arXiv:1802.05983, section 4. All between 0 and 1, of the codes of test images whose factors are known.
"""

import numpy as np
import torch
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

from mae.data.sources import Factors
from mae.errors import ConfigError
from mae.evaluation import drawing, jackknife
from mae.evaluation.material import Result, draw_order
from mae.evaluation.reconstruction import at_most
from mae.evaluation.subject import Subject

VERSION = 1
NEEDS_LABELS = False
OF_MODEL = True
LARGEST = 256  # numbers of a code beyond which these scores, which compare single numbers, say nothing and take hours
SHOWN = 24  # numbers of the code in the picture


def evaluate(
    subject: Subject,
    *,
    samples: int = 10_000,
    bins: int = 20,
    trees: int = 10,
    votes: int = 10_000,
    vote_batch: int = 64,
    least_deviation: float = 0.05,
    draws: int = 5,
    seed: int = 0,
) -> Result:
    """Every score of the codes of at most `samples` test images, with its standard error.

    The code is the `latent` pool where the method has one, else the mean over tokens. Raises ConfigError for data without known
    factors and for codes of more than LARGEST numbers.
    """
    source = at_most(subject.splits.test_images, samples)
    factors = getattr(source, "factors", None)
    if factors is None:
        raise ConfigError(f"the factors of {subject.config.data.name} are not known: choose data.name=shapes or data.name=dsprites")
    features = subject.features(source)
    codes = features["latent" if "latent" in features else "mean"].x.double().numpy()
    if codes.shape[1] > LARGEST:
        raise ConfigError(f"a code of {codes.shape[1]} numbers an image is too large, at most {LARGEST}: lower method.bottleneck_size")

    def scores(ids: Tensor) -> dict[str, float]:
        z, f = codes[ids], factors._replace(values=factors.values[ids])
        voted = factor_vae(z, f, votes=votes, batch=vote_batch, least_deviation=least_deviation, seed=seed)
        return {"mig": mig(z, f, bins=bins), **dci(z, f, trees=trees, seed=seed), "sap": sap(z, f, seed=seed), "factor_vae": voted}

    metrics = scores(torch.arange(len(codes))) | jackknife.deviations(scores, len(codes), draws=draws, seed=seed)
    return Result(metrics | {"n_test": len(codes), "code_size": codes.shape[1]}, {}, {"information": _picture(codes, factors, bins)})


def mutual_information(codes: np.ndarray, factors: Factors, *, bins: int) -> np.ndarray:
    """(k, F) nats between every number of the code, in `bins` equal steps of its range, and every factor."""
    low, high = codes.min(0), codes.max(0)
    steps = np.minimum((codes - low) / np.where(high > low, high - low, 1) * bins, bins - 1).astype(np.int64)
    found = np.zeros((codes.shape[1], len(factors.sizes)))
    for f, size in enumerate(factors.sizes):
        for k in range(codes.shape[1]):
            joint = np.bincount(steps[:, k] * size + factors.values[:, f], minlength=bins * size).reshape(bins, size) / len(codes)
            found[k, f] = _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint)
    return found.clip(min=0)


def mig(codes: np.ndarray, factors: Factors, *, bins: int = 20) -> float:
    """Mutual information gap: how much more the best number tells of a factor than the second best, over the factor's entropy."""
    return float(np.mean(_gaps(mutual_information(codes, factors, bins=bins)) / _entropies(factors)))


def dci(codes: np.ndarray, factors: Factors, *, trees: int = 10, seed: int = 0) -> dict[str, float]:
    """Disentanglement, completeness and informativeness, of how much each number matters to each factor's forest.

    The forests, of extremely random trees (Geurts et al., 2006), are fitted on a random half of the images; informativeness is their
    mean accuracy on the other.
    """
    fitted, held = _two(len(codes), seed)
    importance, accuracy = [], []
    for f in range(len(factors.sizes)):
        # all numbers at every split: a random choice among few would credit numbers that only stand in for the best
        forest = ExtraTreesClassifier(trees, max_features=None, random_state=seed, n_jobs=-1).fit(codes[fitted], factors.values[fitted, f])
        importance.append(forest.feature_importances_)
        accuracy.append(forest.score(codes[held], factors.values[held, f]))
    weights = np.array(importance).T  # (k, F)
    total = max(weights.sum(), 1e-12)
    by_number, by_factor = weights.sum(1), weights.sum(0)
    return {
        "dci_disentanglement": float(by_number / total @ _purity(weights)),
        "dci_completeness": float(by_factor / total @ _purity(weights.T)),
        "dci_informativeness": float(np.mean(accuracy)),
    }


def sap(codes: np.ndarray, factors: Factors, *, seed: int = 0) -> float:
    """Separated attribute predictability: how much better the best number predicts a factor than the second best.

    Of ordered factors the squared correlation; of categories the balanced accuracy, on the other half of the images, of thresholds on
    the one number, as many as tell the categories apart. A perfect code scores below 1 where there are categories: chance is not 0.
    """
    fitted, held = _two(len(codes), seed)
    predictability = np.zeros((codes.shape[1], len(factors.sizes)))
    deviations = codes.std(0)
    for f, (size, ordered) in enumerate(zip(factors.sizes, factors.ordered, strict=True)):
        values = factors.values[:, f]
        if ordered:
            covariance = ((codes - codes.mean(0)) * (values - values.mean())[:, None]).mean(0)
            predictability[:, f] = (covariance / np.maximum(deviations * values.std(), 1e-12)) ** 2
            continue
        for k in range(codes.shape[1]):
            tree = DecisionTreeClassifier(max_leaf_nodes=size, class_weight="balanced", random_state=seed)
            told = tree.fit(codes[fitted, k : k + 1], values[fitted]).predict(codes[held, k : k + 1])
            hits, images = (np.bincount(values[held], weights, minlength=size) for weights in (told == values[held], None))
            predictability[k, f] = np.mean(hits[images > 0] / images[images > 0])  # every category counts alike
    return float(np.mean(_gaps(predictability)))


def factor_vae(
    codes: np.ndarray, factors: Factors, *, votes: int = 10_000, batch: int = 64, least_deviation: float = 0.05, seed: int = 0
) -> float:
    """The accuracy of a majority vote that tells which factor was fixed from the number that varies least.

    A vote draws `batch` images that share one value of one factor. Numbers whose standard deviation is below `least_deviation` of the
    largest one are pruned: the largest is about 1 in a VAE, so that this is the paper's rule, and means the same at any other scale.
    Half as many votes again are what the accuracy is of. 0 where nothing varies.
    """
    deviations = codes.std(0)
    codes = codes[:, deviations >= max(least_deviation * deviations.max(), 1e-12)]
    if not codes.shape[1]:
        return 0.0
    draw = np.random.default_rng(seed)
    scaled = (codes / codes.std(0)).astype(np.float32)
    fixed = draw.integers(len(factors.sizes), size=votes + votes // 2)
    shared = factors.values[draw.integers(len(codes), size=len(fixed)), fixed]
    least = np.empty_like(fixed)
    for f, value in np.unique(np.stack([fixed, shared]), axis=1).T:
        voting = np.flatnonzero((fixed == f) & (shared == value))
        alike = np.flatnonzero(factors.values[:, f] == value)
        drawn = alike[draw.integers(len(alike), size=(len(voting), batch))]
        least[voting] = scaled[drawn].var(1).argmin(1)
    table = np.zeros((codes.shape[1], len(factors.sizes)))
    np.add.at(table, (least[:votes], fixed[:votes]), 1)
    return float(np.mean(table.argmax(1)[least[votes:]] == fixed[votes:]))


def _entropy(shares: np.ndarray) -> float:
    positive = shares[shares > 0]
    return float(-(positive * np.log(positive)).sum())


def _entropies(factors: Factors) -> np.ndarray:
    counts = (np.bincount(column, minlength=size) for column, size in zip(factors.values.T, factors.sizes, strict=True))
    return np.array([max(_entropy(count / count.sum()), 1e-12) for count in counts])


def _gaps(values: np.ndarray) -> np.ndarray:
    """(k, F) -> (F,): the largest minus the second largest of every factor."""
    second, first = np.sort(np.vstack([np.zeros_like(values), values]), axis=0)[-2:]
    return first - second


def _purity(weights: np.ndarray) -> np.ndarray:
    """(R, C) -> (R,): 1 - the entropy of every row's shares in units of log C; 1 = all on one column."""
    shares = weights / np.maximum(weights.sum(1, keepdims=True), 1e-12)
    return np.array([1 - _entropy(row) / np.log(max(len(row), 2)) for row in shares])


def _two(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = draw_order(count, seed, -3).numpy()
    return order[: count // 2], order[count // 2 :]


def _picture(codes: np.ndarray, factors: Factors, bins: int) -> np.ndarray:
    """The share of every factor's entropy that every number of the code tells, the most telling numbers first."""
    share = mutual_information(codes, factors, bins=bins) / _entropies(factors)
    order = np.argsort(-share.max(1), kind="stable")[:SHOWN]
    title = "share of a factor's entropy that a number of the code tells"
    return drawing.matrix(share[order].T, rows=factors.names, columns=[str(k) for k in order], title=title)
