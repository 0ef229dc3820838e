"""What a method makes of images: beside what it was given of them."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mae.evaluation import canvas, drawing
from mae.evaluation.subject import Subject
from mae.nets import vit

OF_VISIBLE, OF_HIDDEN = (f"reconstruction,\n{whose}\nstatistics" for whose in ("visible patches'", "hidden patches'"))
LEAK = "in the last row, from the hidden patches themselves, which gives away their brightness and contrast"


def draw(subject: Subject, images: Tensor, keys: Tensor) -> np.ndarray:
    """Images (N, C, H, W), normalised, as they are, as the method is given them and as it reconstructs them: (H, W, 3) uint8.

    A masked autoencoder that predicts normalised patches (norm_pix) does not say how bright they are and how strong their contrast is. The
    picture says whose mean and deviation make pixels of them: first those of the visible patches, then each hidden patch's own.
    """
    model: Any = subject.model
    caption, rows = "", {"input": images}
    with subject.reading():
        if hasattr(model, "visible"):
            rows["visible"] = model.visible(images, keys=keys)
            made = model.reconstruct(images, keys=keys)
            share = f"{model.hidden_count / math.prod(model.grid):.0%} of the patches are hidden and predicted"
            if model.norm_pix:
                rows |= {OF_VISIBLE: made, OF_HIDDEN: own(model, images, keys)}
                caption = f"{share}, each normalised; for pixels they take mean and deviation from the visible patches or, {LEAK}"
            else:
                rows["reconstruction"] = made
                caption = f"{share}, as pixels: nothing is un-normalised"
        elif hasattr(model, "corrupt"):
            rows["corrupted"] = model.corrupt(images, keys=keys)
            rows["reconstruction"] = model.reconstruct(rows["corrupted"])
        else:
            rows["reconstruction"] = model.reconstruct(images)
    shown = [(name, canvas.colours(x, subject.config)) for name, x in rows.items()]
    return drawing.image_rows(shown, caption=canvas.captioned(caption, subject.config), size=1.0)


def own(model: Any, images: Tensor, keys: Tensor) -> Tensor:
    """The images with the hidden patches replaced by their prediction, un-normalised by their own mean and deviation."""
    prediction, hidden = model.predict(images, keys=keys)
    patches = vit.patchify(images, model.patch).float()
    mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    pixels = torch.where(hidden[..., None], prediction.float() * (variance + 1e-6).sqrt() + mean, patches)
    return vit.unpatchify(pixels, model.grid, model.patch)
