"""An encoder for images of another size or with other channels sees what it can still see."""

import pytest
import timm
import torch
from interop_models import masked_autoencoder

import mae
from mae.errors import ConfigError
from mae.interop.resize import resize
from mae.nets import vit


@pytest.mark.parametrize("size", [(64, 64), (24, 56)])
def test_resized_positions_are_those_of_timm_and_the_model_still_reconstructs(size):
    model = masked_autoencoder()
    before = model.encoder.pos_embed.detach().clone()
    expected = timm.layers.resample_abs_pos_embed(before, [side // 8 for side in size], [4, 4], num_prefix_tokens=1)
    assert resize(model, image_size=size) is model
    assert torch.equal(model.encoder.pos_embed, expected)
    images = torch.randn(2, 3, *size)
    assert model.reconstruct(images).shape == images.shape
    assert model(images, keys=torch.arange(2)).loss.isfinite()
    patches = vit.patchify(images, (8, 8))
    ids = torch.arange(patches.shape[1]).expand(2, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            vit.encode_patches(model.encoder, patches, ids), model.encoder.forward_features(images), rtol=1e-4, atol=1e-5
        )


def test_a_table_that_is_no_square_becomes_another_that_is_none_or_is_one():
    for before, after in (((16, 40), (32, 24)), ((16, 40), (32, 32))):
        model = masked_autoencoder(image_size=before)
        grids = [[side // 8 for side in size] for size in (after, before)]
        expected = timm.layers.resample_abs_pos_embed(model.encoder.pos_embed.detach().clone(), *grids, num_prefix_tokens=1)
        assert torch.equal(resize(model, image_size=after).encoder.pos_embed, expected)
        assert model.reconstruct(torch.randn(1, 3, *after)).shape == (1, 3, *after)


def test_one_channel_is_seen_as_three_equal_ones_were():
    model = masked_autoencoder()
    grey = torch.randn(2, 1, 32, 32)
    noise = torch.rand(2, 16)
    with torch.no_grad():
        colour, pictures = model.encode(grey.expand(-1, 3, -1, -1)), model.reconstruct(grey.expand(-1, 3, -1, -1), noise=noise)
        resize(model, channels=1)
        torch.testing.assert_close(model.encode(grey), colour, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.reconstruct(grey, noise=noise), pictures.mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
        resize(model, channels=5)
        assert model.reconstruct(torch.randn(2, 5, 32, 32)).shape == (2, 5, 32, 32)


def test_what_cannot_be_resized_says_so():
    with pytest.raises(ConfigError, match="not a multiple"):
        resize(masked_autoencoder(), image_size=(30, 32))
    vae = mae.create(["configs/methods/vae.yaml", "encoder.depth=1"])
    with pytest.raises(ConfigError, match="cannot change its images"):
        resize(vae, image_size=(16, 16))
