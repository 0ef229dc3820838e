"""What a Vision Transformer's last block attends to."""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def last_attention(encoder: VisionTransformer, images: Tensor) -> Tensor:
    """How the last block's heads share out their attention over the patches: (B, heads, h, w), none negative, of images (B, C, H, W).

    It is the class token's attention; of an encoder without one, the mean of the patches'. What prefix tokens get is left out, so that
    a head's shares sum to one or less.
    """
    last: Any = encoder.blocks[-1]  # timm's
    attention, found = last.attn, []
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel never holds the shares
    handle = attention.attn_drop.register_forward_hook(lambda module, given, shares: found.append(shares))
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled block knows nothing of the hook
            encoder.forward_features(images)
    finally:
        handle.remove()
        attention.fused_attn = fused
    shares, prefix = found[0], encoder.num_prefix_tokens  # (B, heads, P + N, P + N): from, to
    asking = shares[:, :, 0] if encoder.cls_token is not None else shares[:, :, prefix:].mean(2)
    return asking[..., prefix:].unflatten(2, encoder.patch_embed.grid_size)
