"""Encoders from elsewhere give here what they give there, and ours there what they give here."""

import argparse

import pytest
import timm
import torch
from interop_models import GREY_AND_COLOUR, TOLERANCE, encoder_of, masked_autoencoder, randomise
from safetensors.torch import load_file, save_file

import mae
from mae.interop import assemble, huggingface, official, timm_folder
from mae.interop.load import open_encoder
from mae.keys import Data
from mae.methods.base import Autoencoder
from mae.methods.mae import MAE
from mae.nets import vit


def assert_same(ours, theirs, images, *, noise=None):
    """Features of both pools in both precisions and, where there is a noise, the loss and the picture."""
    for dtype, tolerance in TOLERANCE.items():
        a, b, x = ours.to(dtype), theirs.to(dtype), images.to(dtype)
        with torch.no_grad():
            for pool in ("mean", "cls"):
                torch.testing.assert_close(a.encode(x, pool), b.encode(x, pool), rtol=tolerance, atol=tolerance)
            if noise is not None:
                torch.testing.assert_close(a(x, noise=noise).loss, b(x, noise=noise).loss, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(a.reconstruct(x, noise=noise), b.reconstruct(x, noise=noise), rtol=tolerance, atol=tolerance)
    ours.float(), theirs.float()


def test_hugging_face_features_and_loss(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
    decoder = dict(decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64)
    config = transformers.ViTMAEConfig(**sizes, **decoder, norm_pix_loss=True, mask_ratio=0.5, layer_norm_eps=1e-3)
    full = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in full.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    full.save_pretrained(tmp_path / "full")
    alone = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, mask_ratio=0.0, layer_norm_eps=1e-3)).eval()
    alone.load_state_dict(full.vit.state_dict())
    alone.save_pretrained(tmp_path / "alone")
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    in_order = torch.arange(16.0).expand(2, -1)
    opened, encoder = open_encoder(f"hf:{tmp_path / 'full'}"), open_encoder(str(tmp_path / "alone"))
    assert (opened.kind, opened.image_size, opened.channels, opened.overrides["num_heads"]) == ("hf", (32, 32), 3, 3)
    assert (opened.model.mask_ratio, opened.model.norm_pix) == (0.5, True)
    for dtype, tolerance in TOLERANCE.items():
        x = images.to(dtype)
        with torch.no_grad():
            theirs = alone.to(dtype)(x, noise=in_order).last_hidden_state
            for model in (encoder.model, opened.model):
                torch.testing.assert_close(model.to(dtype).encoder.forward_features(x), theirs, rtol=tolerance, atol=tolerance)
            loss = full.to(dtype)(x, noise=noise).loss
            torch.testing.assert_close(opened.model(x, noise=noise).loss, loss, rtol=tolerance, atol=0)


def test_a_plain_vit_of_hugging_face_without_its_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8)
    classifier = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_channels=1)).eval()
    classifier.save_pretrained(tmp_path)
    images = torch.randn(2, 1, 32, 32)
    opened = open_encoder(str(tmp_path / "model.safetensors"))
    assert (opened.channels, opened.mean, opened.std) == (1, (0.5,), (0.5,))
    with torch.no_grad():
        theirs = classifier.vit(images).last_hidden_state
        torch.testing.assert_close(opened.model.encoder.forward_features(images), theirs, rtol=1e-5, atol=1e-5)


def test_what_we_write_opens_in_transformers_without_a_word(tmp_path):
    transformers = pytest.importorskip("transformers")
    model, images, noise = masked_autoencoder(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    (tmp_path / "full").mkdir()
    huggingface.save(model, tmp_path / "full", data=GREY_AND_COLOUR[3])
    keys = set(load_file(tmp_path / "full" / "model.safetensors"))
    assert {"vit.encoder.layer.1.attention.attention.query.weight", "decoder.decoder_layers.0.output.dense.bias"} <= keys
    theirs, report = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "full", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        for dtype, tolerance in TOLERANCE.items():
            expected = theirs.to(dtype).eval()(images.to(dtype), noise=noise).loss
            torch.testing.assert_close(model.to(dtype)(images.to(dtype), noise=noise).loss, expected, rtol=tolerance, atol=0)
    (tmp_path / "alone").mkdir()
    huggingface.save(mae.methods.base.Autoencoder(model.float().encoder), tmp_path / "alone", data=GREY_AND_COLOUR[3])
    theirs, report = transformers.ViTMAEModel.from_pretrained(tmp_path / "alone", output_loading_info=True)
    assert not any(report.values())
    with torch.no_grad():
        for dtype, tolerance in TOLERANCE.items():
            x = images.to(dtype)
            found = theirs.to(dtype).eval()(x, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
            torch.testing.assert_close(model.to(dtype).encoder.forward_features(x), found, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["hf", "official"])
def test_an_encoder_alone_comes_back_as_it_went(layout, tmp_path):
    model = Autoencoder(encoder_of())
    files = {"hf": huggingface, "official": official}[layout].save(model, tmp_path, data=GREY_AND_COLOUR[3])
    opened = open_encoder(str(tmp_path if layout == "hf" else files[0]))
    assert type(opened.model) is Autoencoder
    assert opened.model.encoder.state_dict().keys() == model.encoder.state_dict().keys()
    assert_same(opened.model, model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize(
    ("layout", "channels", "size"),
    [
        ("hf", 1, (32, 32)),
        ("hf", 5, (32, 32)),
        ("official", 1, (32, 32)),
        ("official", 3, (16, 40)),
        ("official", 5, (64, 8)),
    ],
)
def test_a_whole_autoencoder_comes_back_as_it_went(layout, channels, size, tmp_path):
    model = masked_autoencoder(image_size=size, channels=channels)
    data = Data(mean=[0.4 + i / 10 for i in range(channels)], std=[0.2 + i / 10 for i in range(channels)])
    files = {"hf": huggingface, "official": official}[layout].save(model, tmp_path, data=data)
    opened = open_encoder(str(tmp_path if layout == "hf" else files[1]))
    assert (opened.kind, opened.mean, opened.std) == (layout, tuple(data.mean), tuple(data.std))
    assert (opened.image_size, opened.channels) == (size, channels)
    assert opened.model.norm_pix is False
    assert opened.model.encoder.state_dict().keys() == model.encoder.state_dict().keys()
    patches = opened.model.encoder.patch_embed.num_patches
    assert_same(opened.model, model, torch.randn(2, channels, *size), noise=torch.rand(2, patches))
    if layout == "official":  # and to them again: each name, each bit, of the encoder alone too
        for file in files:
            written, again = (torch.load(f, weights_only=True) for f in (file, rewritten(file, data)))
            assert written["args"] == again["args"]
            assert written["model"].keys() == again["model"].keys()
            assert all(torch.equal(x, again["model"][key]) for key, x in written["model"].items())


def rewritten(file, data):
    """A checkpoint of the official layout, read and written again."""
    folder = file.parent / f"again-{file.stem}"
    folder.mkdir()
    official.save(open_encoder(str(file)).model, folder, data=data)
    return folder / file.name


def test_official_checkpoints_encoder_only_whole_and_fine_tuned(tmp_path):
    encoder = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0, depth=2)
    vit.set_sincos_positions(encoder.eval())
    images = torch.randn(2, 3, 32, 32)
    trained_by_them = argparse.Namespace(model="mae_vit", norm_pix_loss=True, mask_ratio=0.75, device="cuda")
    names = official.from_ours(assemble.tensors_of(masked_autoencoder()))
    assert {"mask_token", "decoder_pos_embed", "decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias", "blocks.1.norm1.weight"} <= set(
        names
    )
    torch.save({"model": encoder.state_dict(), "epoch": 3, "args": trained_by_them}, tmp_path / "alone.pth")
    opened = open_encoder(str(tmp_path / "alone.pth"))
    assert (opened.name, opened.kind, opened.overrides["num_heads"]) == ("alone", "official", 3)
    assert_same(opened.model, Autoencoder(encoder), images)

    tuned = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=10, depth=2, global_pool="avg").eval()
    randomise(tuned)
    assert "fc_norm.weight" in tuned.state_dict()
    torch.save({"model": {f"module.{k}": v for k, v in tuned.state_dict().items()}}, tmp_path / "tuned.pth")
    opened = open_encoder(str(tmp_path / "tuned.pth")).model
    timm_folder.save(opened.encoder, tmp_path / "tuned", data=GREY_AND_COLOUR[3], tag="tuned")
    again = open_encoder(str(tmp_path / "tuned")).model
    with torch.no_grad():
        for dtype, tolerance in TOLERANCE.items():
            x = images.to(dtype)
            expected = tuned.to(dtype).forward_head(tuned.forward_features(x), pre_logits=True)
            for model in (opened, again):
                torch.testing.assert_close(model.to(dtype).encode(x), expected, rtol=tolerance, atol=tolerance)


KINDS = {
    "plain": dict(),
    "registers": dict(reg_tokens=4),
    "registers with positions of their own": dict(reg_tokens=4, no_embed_class=True),
    "no class token": dict(class_token=False),
    "not square": dict(image_size=(16, 40)),
    "grey": dict(channels=1),
    "layer scale, normalised keys, no bias": dict(init_values=0.1, qk_norm=True, qkv_bias=False, mlp_ratio=3.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_timm_folders_and_files_of_every_kind_of_vit(kind, tmp_path):
    encoder = encoder_of(**KINDS[kind])
    size, channels = encoder.patch_embed.img_size, encoder.patch_embed.proj.in_channels
    timm_folder.save(encoder, tmp_path / "encoder", data=GREY_AND_COLOUR[channels], tag="trained")
    opened = open_encoder(str(tmp_path / "encoder"))
    assert (opened.name, opened.kind, opened.image_size, opened.channels) == ("trained", "timm", size, channels)
    assert list(opened.mean) == GREY_AND_COLOUR[channels].mean
    images = torch.randn(2, channels, *size)
    # architecture and overrides are enough to build it anew, which is how training starts from it
    again = vit.create_encoder(opened.architecture, image_size=opened.image_size, channels=opened.channels, overrides=opened.overrides)
    again.load_state_dict(opened.model.encoder.state_dict(), strict=True)
    with torch.no_grad():
        expected = encoder.forward_features(images)
        for model in (opened.model.encoder, again.eval()):
            assert torch.equal(model.forward_features(images), expected)
    assert open_encoder(str(tmp_path / "encoder" / "model.safetensors")).overrides == opened.overrides  # by the config.json beside it
    # an encoder in float64 keeps every bit
    timm_folder.save(randomise(encoder.double()), tmp_path / "double", data=GREY_AND_COLOUR[channels], tag="trained")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'double'}").double().eval()
    theirs.load_state_dict(load_file(tmp_path / "double" / "model.safetensors"), strict=True)
    with torch.no_grad():
        assert torch.equal(theirs.forward_features(images.double()), encoder.forward_features(images.double()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "not square"])
def test_the_architecture_shows_in_the_weights(kind, tmp_path):
    encoder = encoder_of(**({"embed_dim": 128, "num_heads": 2} | KINDS[kind]))
    save_file(encoder.state_dict(), tmp_path / "weights.safetensors")
    opened = open_encoder(str(tmp_path / "weights.safetensors"))
    images = torch.randn(2, opened.channels, *opened.image_size)
    with torch.no_grad():
        assert torch.equal(opened.model.encoder.forward_features(images), encoder.forward_features(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch32_224", "vit_base_patch8_224", "vit_huge_patch14_224"])
def test_known_sizes_are_called_by_their_names(name):
    from mae.interop.architecture import infer

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    found = infer(model.state_dict(), what=name)
    assert (found.name, found.overrides, found.image_size, found.channels) == (name, {}, (224, 224), 3)


def test_what_the_hub_has_is_taken_from_the_cache_without_a_network(tmp_path, monkeypatch):
    from mae.interop import hub

    def cached(name, file, *, local_files_only):
        """The cache of the hub's client: what is not there is an error without a network."""
        if not (tmp_path / name / file).is_file():
            raise hub.LocalEntryNotFoundError(file)
        return str(tmp_path / name / file)

    monkeypatch.setattr(hub.huggingface_hub, "hf_hub_download", cached)
    monkeypatch.setattr(hub.huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model, images = timm.create_model("vit_tiny_patch16_224").eval(), torch.randn(1, 3, 224, 224)
    home = tmp_path / timm.get_pretrained_cfg("vit_tiny_patch16_224").hf_hub_id
    home.mkdir(parents=True)
    save_file(model.state_dict(), home / "model.safetensors")
    opened = open_encoder("timm:vit_tiny_patch16_224")
    assert opened[1:] == ("vit_tiny_patch16_224", "vit_tiny_patch16_224", {}, (224, 224), 3, (0.5,) * 3, (0.5,) * 3, 1 / 0.9, "timm")
    with torch.no_grad():
        assert torch.equal(opened.model.encode(images, "cls"), model.forward_features(images)[:, 0])

    (tmp_path / "somebody" / "theirs").mkdir(parents=True)
    huggingface.save(masked_autoencoder(), tmp_path / "somebody" / "theirs", data=GREY_AND_COLOUR[3])
    assert isinstance(open_encoder("hf:somebody/theirs").model, MAE)
    timm_folder.save(encoder_of(), tmp_path / "somebody" / "ours", data=GREY_AND_COLOUR[3], tag="ours")
    assert open_encoder("hf:somebody/ours").overrides["embed_dim"] == 32
