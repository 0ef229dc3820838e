"""A trained encoder for images of another size or with other channels."""

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.methods.base import Autoencoder
from mae.methods.mae import MAE
from mae.nets import sizes


def resize(model: Autoencoder, *, image_size: tuple[int, int] | None = None, channels: int | None = None) -> Autoencoder:
    """Changes the model in place, to images of (H, W) pixels with so many channels, and returns it.

    Position tables are resampled (bicubic, antialiased: timm's resample_abs_pos_embed). The first layer's weights are summed for one
    channel, repeated and scaled for others (timm's adapt_input_conv); a MAE's last layer predicts the mean of the channels, or repeats
    them. Raises ConfigError where a side is no multiple of the patch, and for models that have grown together with their sizes.
    """
    encoder = model.encoder
    size, before = tuple(image_size or encoder.patch_embed.img_size), encoder.patch_embed.proj.in_channels
    if size == tuple(encoder.patch_embed.img_size) and channels in (None, before):
        return model
    if not isinstance(encoder, VisionTransformer) or type(model) not in (Autoencoder, MAE):
        raise ConfigError(f"a {type(model).__name__} around a {type(encoder).__name__} cannot change its images: train one for these")
    if channels not in (None, before):
        _to_channels(model, channels)
    if size != tuple(encoder.patch_embed.img_size):
        _to_size(model, encoder, size)
    return model


def _to_size(model: Autoencoder, encoder: VisionTransformer, image_size: tuple[int, int]) -> None:
    embed = encoder.patch_embed
    before, after = embed.grid_size, sizes.grid(image_size, embed.patch_size[0])
    encoder.set_input_size(img_size=image_size)
    if isinstance(model, MAE):
        positions = model.decoder.positions
        model.decoder.positions = resample_abs_pos_embed(positions, new_size=list(after), old_size=list(before), num_prefix_tokens=0)
        share = model.predicted_count / model.hidden_count
        model.grid, model.hidden_count = after, sizes.hidden_count(embed.num_patches, model.mask_ratio)
        model.predicted_count = max(round(share * model.hidden_count), 1)


def _to_channels(model: Autoencoder, channels: int) -> None:
    first = model.encoder.patch_embed.proj
    before = first.in_channels
    first.weight = _like(first.weight, adapt_input_conv(channels, first.weight.detach(), base_chans=before))
    first.in_channels = channels
    if isinstance(model, MAE):
        last = model.decoder.pred
        last.weight, last.bias = (_like(x, _predicted(x.detach(), before, channels)) for x in (last.weight, last.bias))
        last.out_features = len(last.bias)


def _predicted(x: Tensor, before: int, channels: int) -> Tensor:
    """(p * q * before, ...) -> (p * q * channels, ...), the channel fastest."""
    x = x.unflatten(0, (-1, before))
    x = x.mean(1, keepdim=True) if channels == 1 else x[:, torch.arange(channels) % before]
    return x.flatten(0, 1)


def _like(parameter: Tensor, x: Tensor) -> nn.Parameter:
    return nn.Parameter(x.contiguous(), requires_grad=parameter.requires_grad)
