"""What a model's code space looks like: images drawn from it, lines between images, and walks along its most active numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae.evaluation import canvas, drawing
from mae.evaluation.subject import Subject

COLUMNS, ROWS = 12, 3  # of a grid of samples
STEPS = 9  # along a line or a walk
PAIRS, WALKED = 4, 8  # lines, and numbers of the code that are walked along
TITLES = {"prior": "from the prior", "gmm": "from the mixture"}
REACH = 2.5  # standard deviations that a walk goes to either side


def samples(subject: Subject, drawn: Mapping[str, Tensor]) -> np.ndarray:
    """Rows of images (n, C, H, W) by where they come from."""
    count = min(COLUMNS, *(len(images) for images in drawn.values()))
    rows = []
    for name, images in drawn.items():
        lines = canvas.colours(images[: (ROWS if name in TITLES else 1) * count], subject.config)
        starts = range(0, len(lines) - count + 1, count)
        rows += [("" if start else TITLES.get(name, name), lines[start : start + count]) for start in starts]
    return drawing.image_rows(rows, size=0.75, caption=canvas.captioned("", subject.config))


@torch.no_grad()
def code_space(subject: Subject, code: Any, images: Tensor) -> dict[str, np.ndarray]:
    """Straight lines between the codes of test images (n, C, H, W), and what each of the most active numbers of the code changes."""
    with subject.reading():
        codes = torch.cat([code(some.to(subject.device)).float() for some in images[:1024].split(256)])
        lines = {"interpolations": _lines(subject, codes, images)} if len(codes) > 1 else {}
        return lines | {"latent-walk": walks(subject, codes)}


def _lines(subject: Subject, codes: Tensor, images: Tensor) -> np.ndarray:
    pairs = min(PAIRS, len(codes) // 2)
    share = torch.linspace(0, 1, STEPS, device=codes.device).view(-1, *[1] * (codes.ndim - 1))
    rows = []
    for i in range(pairs):
        start, end = images[2 * i : 2 * i + 2].split(1)
        between = subject.model.decode(torch.lerp(codes[2 * i], codes[2 * i + 1], share)).float().cpu()
        rows.append((f"pair {i + 1}", canvas.colours(torch.cat([start, between, end]), subject.config)))
    caption = "a test image, decoded codes on the straight line to another test image's, that image"
    return drawing.image_rows(rows, size=0.75, caption=canvas.captioned(caption, subject.config))


def walks(subject: Subject, codes: Tensor) -> np.ndarray:
    """What each of the most active numbers of the codes (n, ...) changes: the first code, one number at a time moved to either side."""
    flat = codes.flatten(1)
    deviation, mean = flat.std(0, correction=0), flat.mean(0)
    rows = []
    for k in deviation.argsort(descending=True, stable=True)[:WALKED].tolist():
        walked = flat[:1].repeat(STEPS, 1)
        walked[:, k] = mean[k] + torch.linspace(-REACH, REACH, STEPS, device=flat.device) * deviation[k]
        made = subject.model.decode(walked.view(STEPS, *codes.shape[1:]))
        rows.append((f"{_named(k, codes.shape[1:])}, std {deviation[k]:.2g}", canvas.colours(made, subject.config)))
    caption = f"an image's code, one number at a time moved from -{REACH} to +{REACH} of its standard deviations about its mean"
    return drawing.image_rows(rows, size=0.75, caption=canvas.captioned(caption, subject.config))


def _named(k: int, shape: Sequence[int]) -> str:
    """Number k of a code of this shape: (size,), or (places, size)."""
    return f"z{k}" if len(shape) == 1 else f"patch {k // shape[1]}, z{k % shape[1]}"
