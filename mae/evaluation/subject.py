"""What is measured: something that turns images into features, together with the images it is measured on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from mae.config import Config
from mae.data.loader import evaluation_batches, normalise
from mae.data.sources import Source, Splits, Subset
from mae.errors import ConfigError
from mae.evaluation.features import ALONE, Share, encodes_itself, evaluating, extract, gather, pools_of
from mae.evaluation.material import Features, Material
from mae.methods.base import Autoencoder
from mae.nets.precision import computing


@dataclass(frozen=True)
class Subject:
    """A model, its data and how it is read. Evaluators of features take `material`; others take the subject itself."""

    model: Autoencoder
    config: Config
    splits: Splits
    device: torch.device
    precision: str = "fp32"
    kept: Path | None = None  # the folder where features are kept
    share: Share = ALONE
    also: tuple[str, ...] = ()  # LAYERS, TOKENS: what the pass over the images keeps beside the pools, for all protocols
    open_other: Callable[[str], tuple[Autoencoder, Config]] | None = None  # ENCODER -> its model, and how it reads the same images

    @cached_property
    def material(self) -> Material:
        """The features of the three splits, on the device."""
        return gather(self.features, self.splits).to(self.device)

    def features(self, source: Source) -> dict[str, Features]:
        """The features of a source's images in its order, on the CPU, one Features (N, D) a pool; kept on disk."""
        return {pool: self.read(source)[pool] for pool in pools_of(self.model)}

    def read(self, source: Source) -> dict[str, Features]:
        """The features, and of a split what `also` asks for: all of it from one pass over the images."""
        if source.fingerprint in self._read:
            return self._read[source.fingerprint]
        also = self.also if not encodes_itself(self.model) and any(source is split for split in self.splits) else ()
        found = extract(
            self.model, source, self.config, also=also, device=self.device, precision=self.precision, cache=self.kept, share=self.share
        )
        if also:  # not to be had from the disk
            self._read[source.fingerprint] = found
        return found

    def known(self, source: Source, name: str) -> dict[str, Features] | None:
        """What was read of a split or of some of its images, where `also` names what is looked for; else None."""
        if name not in self.also or encodes_itself(self.model):
            return None
        for split in self.splits:
            if source is split:
                return self.read(split)
            if isinstance(source, Subset) and source.source is split:
                rows = torch.from_numpy(source.positions)
                return {key: f.rows(rows) for key, f in self.read(split).items()}
        return None

    @cached_property
    def _read(self) -> dict[str, dict[str, Features]]:
        return {}  # by the source's fingerprint; not handed on to another subject

    def batches(self, source: Source, *, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """A source's images, normalised, (B, C, H, W) on the device, in its order, with their keys (B,) int64."""
        for batch in evaluation_batches(source, self.config, batch_size=size, device=self.device):
            yield normalise(batch.images, self.config.data), batch.keys

    def beside(self, encoder: str) -> "Subject":
        """Another encoder on the same images. Raises ConfigError where none can be opened (a control stands beside nobody)."""
        if self.open_other is None:
            raise ConfigError("another encoder is only opened by `mae evaluate ENCODER`: use that command")
        model, config = self.open_other(encoder)
        return replace(self, model=model.to(self.device), config=config, open_other=None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While entered, the model is in evaluation mode, in the subject's precision and without gradients."""
        with evaluating(self.model), computing(self.precision, self.device), torch.no_grad():
            yield
