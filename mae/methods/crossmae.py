"""CrossMAE: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders", arXiv:2401.14391.

The masked autoencoder with a decoder in which hidden patches attend to visible ones alone. They are then independent of each other, so
that predicting a share of them costs that share. (The paper's weighted features of all encoder blocks are left out: the last one's serve.)
"""

from timm.models.vision_transformer import VisionTransformer

from mae.methods.mae import MAE
from mae.nets.decoder import CrossDecoder


def create(
    encoder: VisionTransformer,
    *,
    mask_ratio: float = 0.75,
    masking: str = "random",
    norm_pix: bool | str = "auto",
    predict_share: float = 0.25,
    decoder_depth: int | str = "auto",
    decoder_width: int | str = "auto",
    decoder_heads: int | str = "auto",
) -> MAE:
    """A MAE with a cross-attention decoder that predicts a share of the hidden patches. Raises ConfigError as MAE does."""
    method = MAE(encoder, mask_ratio=mask_ratio, masking=masking, norm_pix=norm_pix, predict_share=predict_share)
    method.decoder = CrossDecoder(encoder, depth=decoder_depth, width=decoder_width, heads=decoder_heads)
    return method
