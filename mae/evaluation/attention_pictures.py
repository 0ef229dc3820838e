"""Where the last block looks: the attention of the class token, as a mean over heads and head by head."""

import numpy as np
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.evaluation import canvas, drawing
from mae.evaluation.subject import Subject
from mae.nets.attention import last_attention

HEADS = 4  # that are shown one by one
BRIGHTEST = 99.0  # percentile of all shares that is shown brightest


def draw(subject: Subject, images: Tensor) -> np.ndarray:
    """Images (N, C, H, W), normalised, above their attention maps, all in one scale of colours: (H, W, 3) uint8."""
    from matplotlib import colormaps

    encoder = subject.model.encoder
    assert isinstance(encoder, VisionTransformer)  # nobody asks others
    with subject.reading():
        maps = last_attention(encoder, images).float().cpu().numpy()  # (N, heads, h, w)
    even = maps * maps.shape[2] * maps.shape[3]  # 1 = as much as every other patch
    top = max(float(np.percentile(even, BRIGHTEST)), 1.0)
    patch = images.shape[2] // maps.shape[2]

    def shaded(part: np.ndarray) -> np.ndarray:
        """(N, h, w) -> (N, H, W, 3)"""
        return colormaps["magma"](np.clip(part / top, 0, 1))[..., :3].repeat(patch, 1).repeat(patch, 2)

    heads = maps.shape[1]
    rows = [("input", canvas.colours(images, subject.config)), (f"mean of\n{heads} heads", shaded(even.mean(1)))]
    rows += [(f"head {i + 1}", shaded(even[:, i])) for i in range(min(heads, HEADS)) if heads > 1]
    who = "class token" if subject.model.encoder.cls_token is not None else "mean patch"
    caption = f"what the {who} attends to in the last block: black nothing, brightest {top:.2g} times an even share or more"
    return drawing.image_rows(rows, caption=canvas.captioned(caption, subject.config), size=1.0)
