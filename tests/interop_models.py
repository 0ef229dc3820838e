"""Small models with random weights, for the tests of what goes in and out."""

import torch

import mae
from mae import config
from mae.keys import Data
from mae.methods.mae import MAE
from mae.nets import vit
from mae.training import checkpoint
from mae.training.run import RunFolder

TINY = dict(patch_size=8, embed_dim=32, depth=2, num_heads=4)
GREY_AND_COLOUR = {1: Data(mean=[0.4], std=[0.2]), 3: Data(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.1])}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    return model.eval()


def encoder_of(*, image_size=(32, 32), channels=3, fixed=False, **overrides):
    encoder = vit.create_encoder("vit_tiny_patch16_224", image_size=image_size, channels=channels, overrides=TINY | overrides)
    randomise(encoder)
    if fixed:
        vit.set_sincos_positions(encoder)
    return encoder


def masked_autoencoder(image_size=(32, 32), channels=3):
    model = MAE(encoder_of(image_size=image_size, channels=channels), decoder_depth=1, decoder_width=16, decoder_heads=2, norm_pix=False)
    randomise(model.decoder)
    vit.set_sincos_positions(model.encoder)
    return model.eval()


def untrained_run(path, words):
    """A run folder as training leaves it, of a method with fresh weights."""
    folder = RunFolder(path)
    folder.create(config.load(words), {})
    weights = {f"model.{name}": value for name, value in mae.create(words).state_dict().items()}
    checkpoint.save(folder.checkpoints, 1, weights, {}, facts={}, keep=1)
    return folder.path
