"""Properties of the masked autoencoder itself."""

import pytest
import torch

import mae
from mae.errors import ConfigError
from mae.nets import vit

SMALL = ["data.image_size=16", "data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
SMALL += ["encoder.patch_size=4", "encoder.embed_dim=32", "encoder.depth=2"]


def small(*words):
    return mae.create([*SMALL, *words])


def inputs(count=4, channels=3, size=(16, 16)):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, *size, generator=generator), torch.arange(count)


def test_hidden_patches_do_not_change_the_encoding():
    method = small().eval()
    images, keys = inputs()
    patches, split = vit.patchify(images, (4, 4)), method.split(keys)
    changed = patches.scatter(1, split.hidden[..., None].expand(-1, -1, patches.shape[2]), 7.0)
    first, second = (vit.encode_patches(method.encoder, p, split.visible) for p in (patches, changed))
    assert torch.equal(first, second)


def test_loss_is_of_hidden_patches_alone_and_of_each_sample_by_its_own_key():
    method = small("method.norm_pix=false").eval()
    images, keys = inputs()
    whole = method(images, keys=keys).loss
    each = torch.stack([method(images[i : i + 1], keys=keys[i : i + 1]).loss for i in range(4)])
    torch.testing.assert_close(whole, each.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(method(images.repeat(2, 1, 1, 1), keys=keys.repeat(2)).loss, whole, rtol=1e-5, atol=1e-6)
    prediction, hidden = method.predict(images, keys=keys)
    expected = (prediction - vit.patchify(images, (4, 4))).square().mean(-1)[hidden].mean()
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-6)


def test_predicting_a_share_decodes_random_hidden_patches_and_no_visible_one():
    method = small("method.predict_share=0.25", "method.masking=grid").eval()
    _, keys = inputs(count=400)
    split = method.split(keys)
    some = method._some(split.hidden, keys)
    assert some.shape == (400, 3)
    assert (some[:, :, None] == split.hidden[:, None, :]).any(2).all()
    share = torch.zeros(400, 16).scatter(1, some, 1).mean(0)
    assert (share - 3 / 16).abs().max() < 5 * (3 / 16 * 13 / 16 / 400) ** 0.5
    images, keys = inputs()
    assert torch.isfinite(method(images, keys=keys).loss)
    with pytest.raises(ConfigError, match="at most 1"):
        small("method.predict_share=1.5")


def test_reconstruction_keeps_the_visible_pixels_and_leaks_nothing_of_the_hidden_ones():
    method = small().eval()
    images, keys = inputs()
    hidden = method.predict(images, keys=keys).hidden
    made = vit.patchify(method.reconstruct(images, keys=keys), (4, 4))
    patches = vit.patchify(images, (4, 4))
    assert torch.equal(made[~hidden], patches[~hidden])
    other = vit.unpatchify(torch.where(hidden[..., None], torch.tensor(9.0), patches), (4, 4), (4, 4))
    torch.testing.assert_close(vit.patchify(method.reconstruct(other, keys=keys), (4, 4))[hidden], made[hidden])


@pytest.mark.parametrize(
    "words",
    [
        ["data.image_size=[8,24]"],
        ["data.channels=5", "data.mean=[0,0,0,0,0]", "data.std=[1,1,1,1,1]"],
        ["encoder.reg_tokens=3"],
        ["encoder.class_token=false"],
        ["method.masking=block"],
        ["method.masking=grid", "method.norm_pix=false"],
    ],
    ids=lambda words: words[0],
)
def test_every_shape_trains_and_encodes(words):
    method = small(*words)
    size, channels = method.encoder.patch_embed.img_size, method.encoder.patch_embed.proj.in_channels
    images, keys = inputs(channels=channels, size=size)
    loss = method(images, keys=keys).loss
    loss.backward()
    assert torch.isfinite(loss)
    missing = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert method.encode(images).shape == (4, 32)
    assert method.feature_maps(images, [0, -1])[1].shape == (4, 32, size[0] // 4, size[1] // 4)


def test_encoder_state_is_exactly_timms():
    import timm

    method = small("encoder.reg_tokens=2", "encoder.num_heads=4", "encoder.mlp_ratio=4")
    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, reg_tokens=2, num_classes=0
    )
    assert {k: v.shape for k, v in method.encoder.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_clip_224.openai",  # a norm before the blocks
        "deit3_small_patch16_224",  # layer scale, no position for CLS
        "vit_small_patch14_reg4_dinov2",  # registers, patches of 14
        "vit_base_patch16_siglip_224",  # no CLS, attention pooling
        "vit_relpos_small_patch16_224",  # relative positions: refused
    ],
)
def test_any_timm_vision_transformer_is_an_encoder_or_is_refused_in_a_sentence(name):
    words = ["data.image_size=28", "encoder.patch_size=14", "encoder.embed_dim=32", "encoder.depth=2", "encoder.num_heads=2"]
    words += ["data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]", f"encoder.name={name}"]
    if "relpos" in name:
        with pytest.raises(ConfigError, match="choose a vit"):
            mae.create(words)
        return
    method = mae.create(words)
    images, keys = inputs(size=(28, 28))
    assert torch.isfinite(method(images, keys=keys).loss)
    patches, ids = vit.patchify(images, (14, 14)), torch.arange(4).expand(4, -1)
    with torch.no_grad():
        torch.testing.assert_close(
            vit.encode_patches(method.encoder, patches, ids), method.encoder.forward_features(images), rtol=1e-4, atol=1e-4
        )


def test_class_token_pooling_needs_one():
    with pytest.raises(ConfigError, match="pool=mean"):
        small("encoder.class_token=false").encode(inputs()[0], pool="cls")


def test_constant_images_are_learnt_within_a_few_steps():
    """Gradients point the right way through mask, encoder and decoder."""
    method = small("method.norm_pix=false", "method.mask_ratio=0.5")
    images, keys = torch.full((8, 3, 16, 16), 0.7), torch.arange(8)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = method(images, keys=keys).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.05 * losses[0]
