"""Generation: how near are images drawn from a model to test images, and is its code a space one can walk in?

Images come from the method's prior, and from a mixture of Gaussians fitted on training codes (Ghosh et al., arXiv:1903.12436), which gives
methods without a prior one. KID and FID (distances.py) in the features of an in-project classifier (judge.py), beside those of real images.
"""

import copy
from typing import Any

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

from mae.data.sources import Source
from mae.errors import ConfigError
from mae.evaluation import distances, generation_pictures, jackknife, judge
from mae.evaluation.features import encodes_itself, evaluating
from mae.evaluation.material import Result, draw_order, standardiser
from mae.evaluation.reconstruction import at_most
from mae.evaluation.subject import Subject

VERSION = 1
NEEDS_LABELS = False
OF_MODEL = True
FULL = 128  # numbers of a code up to which a component has a full covariance
FEWEST = 4  # images: two in each half that a standard error is drawn from
LARGEST = 1024  # beyond which no mixture is fitted


def evaluate(
    subject: Subject,
    *,
    images: int = 2000,
    components: int = 10,
    code_images: int = 5000,
    prior_steps: int = 1000,
    classifier_steps: int = 500,
    classifier_batch: int = 128,
    iwae_samples: int = 50,
    iwae_images: int = 500,
    draws: int = 20,
    seed: int = 0,
) -> Result:
    """KID and FID of as many generated as test images: '..._prior', '..._gmm' and, of real images nothing was fitted to, '..._real'.

    Each with its standard error over halves. 'iwae_bound' is a lower bound of the mean log p(x) of test images in nats of the
    normalised pixels, where the method has one. Raises ConfigError for a method that draws nothing.
    """
    model, train, validation, test = subject.model, subject.splits.train, subject.splits.validation, subject.splits.test_images
    code = code_of(model)
    if code is None and not hasattr(model, "sample"):
        raise ConfigError(f"{type(model).__name__} draws no images: choose a method with a code and a decoder, such as method.name=vae")
    order = draw_order(len(train), seed, -5).numpy()
    count = min(images, len(test), len(validation) + len(train) // 3)
    if count < FEWEST:
        raise ConfigError(f"images to compare with, of the test split and held out, number {count}: generation takes at least {FEWEST}")
    spare = max(count - len(validation), 0)
    learnt, unseen = judge.part(train, order[spare:]), judge.part(train, order[:spare])
    seen_by = judge.appoint(subject, learnt, validation, steps=classifier_steps, batch_size=classifier_batch, seed=seed)

    drawn, settings = _draw(subject, code, count, components, code_images, prior_steps, seed)
    if not drawn:
        raise ConfigError(f"the code of {type(model).__name__} is too large for a mixture, and it has no prior to draw from")
    real = _images(subject, at_most(test, count))
    held = torch.cat([_images(subject, source) for source in (validation, unseen) if len(source)])[:count]
    metrics = _distances(seen_by, {**drawn, "real": held}, real, subject.device, draws, seed)
    if seen_by.accuracy is not None:
        settings["classifier_accuracy"] = seen_by.accuracy
    metrics |= _iwae(subject, iwae_samples, iwae_images)
    pictures = {"samples": generation_pictures.samples(subject, {"test images": real, **drawn})}
    if code is not None:
        pictures |= generation_pictures.code_space(subject, code, real)
    return Result(metrics | {"n_test": count}, settings, pictures)


def code_of(model: Any) -> Any:
    """The function from images to codes that `decode` turns back; None for a method without one, or whose codes are from a list."""
    if not hasattr(model, "decode") or hasattr(model, "indices"):
        return None
    return model.latent if hasattr(model, "code") else model.encode if encodes_itself(model) else None


@torch.no_grad()
def _draw(
    subject: Subject, code: Any, count: int, components: int, code_images: int, prior_steps: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`count` images (count, C, H, W) of every way to draw, on the CPU."""
    model: Any = subject.model  # what it has besides a method's own is asked for by name
    settings: dict[str, Any] = {}
    drawn: dict[str, Tensor] = {}
    if hasattr(model, "fit_prior") and not getattr(model, "prior_steps", 1):
        model = copy.deepcopy(model)  # the prior over codes is the evaluation's, the run's own stays as it was
        with evaluating(model):
            settings["prior_nats"] = model.fit_prior(subject.batches(subject.splits.train), steps=prior_steps, seed=seed)
    if hasattr(model, "sample"):
        with evaluating(model):
            drawn["prior"] = model.sample(count, seed).float().cpu()
    if code is None:
        return drawn, settings
    with subject.reading():
        some = at_most(subject.splits.train, code_images)
        codes = torch.cat([code(images).float().cpu() for images, _ in subject.batches(some)])
        if codes[0].numel() <= LARGEST and len(codes) > components:
            flat = _mixture(codes.flatten(1).double().numpy(), components, count, seed)
            made = torch.from_numpy(flat).float().view(count, *codes.shape[1:])
            drawn["gmm"] = torch.cat([model.decode(z.to(subject.device)).float().cpu() for z in made.split(256)])
    return drawn, settings


def _mixture(codes: np.ndarray, components: int, count: int, seed: int) -> np.ndarray:
    """`count` codes (count, k) drawn from a mixture of Gaussians fitted on codes (N, k)."""
    scale = codes.std() + 1e-12  # so that the floor of the variances means the same for every code
    covariance = "full" if codes.shape[1] <= FULL else "diag"
    mixture = GaussianMixture(components, covariance_type=covariance, reg_covar=1e-4, random_state=seed).fit(codes / scale)
    drawn, _ = mixture.sample(count)
    return scale * drawn[draw_order(count, seed, -7).numpy()]  # they come sorted by component


def _images(subject: Subject, source: Source) -> Tensor:
    return torch.cat([images.cpu() for images, _ in subject.batches(source)])


@torch.no_grad()
def _distances(
    seen_by: judge.Judge, drawn: dict[str, Tensor], real: Tensor, device: torch.device, draws: int, seed: int
) -> dict[str, float]:
    def features(images: Tensor) -> Tensor:
        return torch.cat([seen_by.features(part.to(device)).cpu() for part in images.split(256)])

    truth = features(real)
    mean, scale = standardiser(truth)
    metrics: dict[str, float] = {}
    for name, images in drawn.items():
        x, y = ((z - mean) * scale for z in (features(images), truth[: len(images)]))

        def measure(ids: Tensor, x: Tensor = x, y: Tensor = y, name: str = name) -> dict[str, float]:
            found = {"kid": distances.kid(x[ids], y[ids]), "fid": distances.fid(x[ids], y[ids])}
            return {f"{kind}_{seen_by.name}_{name}": value for kind, value in found.items()}

        metrics |= measure(torch.arange(len(x))) | jackknife.deviations(measure, len(x), draws=draws, seed=seed)
    return metrics


@torch.no_grad()
def _iwae(subject: Subject, samples: int, limit: int) -> dict[str, float]:
    model: Any = subject.model
    if not hasattr(model, "iwae_bound"):
        return {}
    with evaluating(model):  # float32: the bound is a small difference of large sums
        batches = subject.batches(at_most(subject.splits.test_images, limit), size=64)
        bound = torch.cat([model.iwae_bound(images, keys, samples=samples).double().cpu() for images, keys in batches])
    spread = float(bound.std() / len(bound) ** 0.5) if len(bound) > 1 else 0.0
    return {"iwae_bound": float(bound.mean()), "iwae_bound_ci95": 1.96 * spread, "n_iwae": len(bound)}
