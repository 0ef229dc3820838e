"""What a run tells about itself on held-out images: reconstruction, the spread of its features, and what its method watches."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mae.config import Config
from mae.data.loader import evaluation_batches, normalise
from mae.data.sources import Splits
from mae.evaluation import reconstruction
from mae.evaluation.features import evaluating
from mae.methods.base import Autoencoder, effective_rank

LARGE_GAP = 0.25  # of the variance: from here on a model rather remembers than generalises


class Diagnosis(NamedTuple):
    """Figures to log and sentences for a person."""

    figures: dict[str, float]
    sentences: list[str]  # how it reconstructs, then what is alarming
    learning: bool  # reconstructs better than every baseline, and its features have not collapsed


@torch.no_grad()
def diagnose(model: Autoencoder, splits: Splits, config: Config, *, device: torch.device | str, limit: int = 1024) -> Diagnosis:
    """Looks at `limit` held-out images (and as many training images, for the gap). The model is left in the modes it was in."""
    report = reconstruction.held_out(model, splits, config, device=device, limit=limit)
    figures, alarms, learning = dict(report.figures), [], report.learning
    gap = figures.get("generalisation_gap", 0.0)
    if report.learning and gap > LARGE_GAP:
        share = 100 * figures["explained_variance_target"]
        alarms.append(
            f"it remembers rather than generalises: {share + 100 * gap:.0f}% of the variance explained on training images, {share:.0f}% "
            "on held-out ones: train for fewer epochs, augment more or raise optim.weight_decay"
        )
    with evaluating(model):
        features = torch.cat([model.encode(images) for images, _ in _batches(splits, config, device, limit)])
        figures["feature_rank"] = effective_rank(features)
        if figures["feature_rank"] < 1.5:
            learning = False
            alarms.append(
                f"the features have collapsed: {features.shape[1]} numbers an image carry about {figures['feature_rank']:.1f} dimensions; "
                "lower optim.base_lr or weaken the method's regulariser"
            )
        if hasattr(model, "diagnose"):
            of_method = model.diagnose(_batches(splits, config, device, limit))
            figures |= of_method.figures
            alarms += of_method.alarms
    sentences = [report.sentence] if report.sentence else []
    return Diagnosis(figures, sentences + [f"WARNING: {alarm}" for alarm in alarms], learning)


def _batches(splits: Splits, config: Config, device: torch.device | str, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised held-out images (B, C, H, W) and their keys (B,)."""
    source = reconstruction.at_most(splits.validation, limit)
    for batch in evaluation_batches(source, config, batch_size=256, device=torch.device(device)):
        yield normalise(batch.images, config.data), batch.keys
