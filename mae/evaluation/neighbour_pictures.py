"""What an encoder takes for alike: held-out images and, beside each, the training images nearest to it."""

import numpy as np
import torch

from mae.data.sources import Source, Subset
from mae.evaluation import canvas, drawing
from mae.evaluation.features import extract
from mae.evaluation.knn import neighbours
from mae.evaluation.reconstruction import at_most
from mae.evaluation.subject import Subject

QUERIES, NEAREST = 6, 8
BANK = 1024  # training images that are looked through


def draw(subject: Subject) -> np.ndarray:
    """QUERIES held-out images and the NEAREST training images of each, by the cosine of mean-pooled features: (H, W, 3) uint8.

    Where there are labels, neighbours of another class than the query's have a red frame.
    """
    bank, queries = at_most(subject.splits.train, BANK), at_most(subject.splits.validation, QUERIES)
    known, asked = (_features(subject, source) for source in (bank, queries))
    _, ids = neighbours(known, asked, NEAREST)  # (Q, k)
    shown = torch.cat([images.cpu() for images, _ in subject.batches(Subset(bank, ids.flatten().numpy()))])
    shown = shown.unflatten(0, ids.shape)
    own = torch.cat([images.cpu() for images, _ in subject.batches(queries)])
    rows, marked = [], []
    for i, (image, near) in enumerate(zip(own, shown, strict=True)):
        rows.append((_title(queries, i), canvas.colours(torch.cat([image[None], near]), subject.config)))
        if queries.labels is not None and bank.labels is not None:
            marked += [(i, j + 1) for j, k in enumerate(ids[i].tolist()) if bank.labels[k] != queries.labels[i]]
    caption = f"held-out images, and the nearest of {len(bank):,} training images by the cosine of mean-pooled features"
    caption += "; framed: of another class" if marked else ""
    caption = canvas.captioned(caption, subject.config)
    return drawing.image_rows(rows, caption=caption, heads={0: "image", 1: "nearest training images"}, marked=marked)


def _features(subject: Subject, source: Source) -> torch.Tensor:
    return extract(subject.model, source, subject.config, device=subject.device, pools=("mean",), precision=subject.precision)["mean"].x


def _title(source: Source, index: int) -> str:
    """The class, shortened."""
    if source.labels is None or source.classes is None:
        return ""
    name = source.classes[int(source.labels[index])]
    return name if len(name) <= 16 else f"{name[:15]}…"
