"""The patch tokens of images: kept in half precision where they fit into memory, else made anew whenever they are read."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mae.data.loader import evaluation_batches, normalise
from mae.data.sources import Source, Subset, fingerprint
from mae.errors import ConfigError
from mae.evaluation.features import TOKENS, encodes_itself
from mae.evaluation.subject import Subject

KEEP_BYTES = 4 * 2**30  # on the subject's device


class Joined:
    """Sources in a row."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts, self.classes = parts, parts[0].classes
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    @cached_property
    def labels(self) -> np.ndarray | None:
        return None if self.classes is None else np.concatenate([part.labels for part in self.parts if len(part)])

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(*(part.fingerprint for part in self.parts))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, index: int) -> np.ndarray:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].read(index - int(self.starts[part]))

    def name_of(self, index: int) -> str:
        part = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.parts[part].name_of(index - int(self.starts[part]))


class Tokens:
    """Patch tokens (N, D) of every image of some sources in a row, after the encoder's final norm, and the images' labels.

    They are rounded to half precision whether they are kept or not, so that KEEP_BYTES does not change a result. Raises ConfigError
    for features that do not come from an encoder's tokens (raw pixels, principal components).
    """

    def __init__(self, subject: Subject, *sources: Source) -> None:
        if encodes_itself(subject.model):
            raise ConfigError(f"{type(subject.model).__name__} has no patch tokens to attend to: take an encoder")
        self.subject, self.source = subject, Joined(sources)
        encoder = subject.model.encoder
        self.width, size = encoder.embed_dim, 2 * encoder.patch_embed.num_patches * encoder.embed_dim
        self.kept: tuple[Tensor, Tensor] | None = None
        known = [subject.known(source, TOKENS) for source in sources]
        if None not in known:
            x, y = zip(*(found[TOKENS] for found in known if found is not None), strict=True)
            self.kept = torch.cat(x).to(subject.device), torch.cat(y).to(subject.device)
        elif len(self.source) * size <= KEEP_BYTES:
            whole = list(self._encoded(torch.arange(len(self.source)), 256))
            self.kept = torch.cat([x for x, _ in whole]), torch.cat([y for _, y in whole])

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, ids: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of those ids (M,), `size` at a time: tokens (B, N, D) float32 and labels (B,) int64, on the subject's device."""
        if self.kept is None:
            yield from ((x.float(), y) for x, y in self._encoded(ids, size))
        else:
            for some in ids.to(self.subject.device).split(size):
                yield self.kept[0][some].float(), self.kept[1][some]

    def _encoded(self, ids: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        subject, encoder = self.subject, self.subject.model.encoder
        source = Subset(self.source, ids.cpu().numpy())
        for batch in evaluation_batches(source, subject.config, batch_size=size, device=subject.device):
            with subject.reading():  # left before the tokens are given away: whoever trains on them needs gradients
                tokens = encoder.forward_features(normalise(batch.images, subject.config.data))
                tokens = tokens[:, encoder.num_prefix_tokens :].half()
            yield tokens, batch.labels
