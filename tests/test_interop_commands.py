"""`mae export` and `mae features`, over a run and over what was written of it; training that starts from an encoder from elsewhere."""

import json

import numpy as np
import pytest
import scipy.special
import timm
import torch
from interop_models import TOLERANCE, untrained_run
from PIL import Image
from safetensors.torch import save_file

import mae
from mae.__main__ import TOOLS
from mae.commands import export, features, reconstruct
from mae.commands.pretraining import _method
from mae.data.batch import normalise
from mae.errors import ConfigError
from mae.evaluation import reconstruction_pictures
from mae.interop import exported_program, onnx_file, timm_folder
from mae.nets import classifier
from mae.training.run import RunFolder

WORDS = ["data.name=folder", "data.image_size=16", "data.workers=0", "data.mean=[0.5,0.4,0.3]", "data.std=[0.25,0.2,0.3]", "data.resize=1"]
WORDS += ["encoder.name=vit_tiny_patch16_224", "encoder.patch_size=4", "encoder.embed_dim=32", "encoder.num_heads=4", "encoder.depth=2"]
WORDS += ["train.device=cpu", "train.precision=fp32", "train.steps=1"]
DIGITS = ["encoder.embed_dim=32", "encoder.depth=1", "train.device=cpu", "train.precision=fp32", "train.steps=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as training leaves it, of an untrained MAE."""
    return untrained_run(tmp_path_factory.mktemp("runs") / "photos-mae", WORDS)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/deep.png"):
        (root / name).parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name)
    (root / "dog" / "damaged.png").write_bytes(b"no image")
    return root


def vectors(encoder, photos, target, *words):
    assert (
        features.main([str(encoder), str(photos), "--out", str(target), "data.workers=0", "data.resize=1", "train.precision=fp32", *words])
        == 0
    )
    with np.load(target) as file:
        return dict(file)


def test_features_are_the_models_by_name_and_by_class(run, photos, tmp_path, capsys):
    found = vectors(run, photos, tmp_path / "made" / "f.npz")
    assert found["names"].tolist() == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/deep.png"]
    assert found["classes"][found["labels"]].tolist() == ["cat", "cat", "dog", "dog"]
    assert "dog/damaged.png" in capsys.readouterr().err
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(photos / name)) for name in found["names"]])).permute(0, 3, 1, 2)
    images = normalise(pixels, mae.config.load(WORDS).data)
    with torch.no_grad():
        for pool in ("mean", "cls"):
            np.testing.assert_allclose(found[pool], mae.load(run).encode(images, pool).numpy(), rtol=1e-5, atol=1e-5)
    larger = vectors(run, photos, tmp_path / "larger.npz", "data.image_size=[24,32]")
    assert larger["mean"].shape == found["mean"].shape


def test_features_and_pictures_have_the_margin_of_the_encoder(tmp_path, monkeypatch):
    """Digits fill their 8 x 8 pixels: what scales them to 9 before the crop cuts their edges off."""
    run, images = untrained_run(tmp_path / "digits", DIGITS), np.random.default_rng(0).integers(0, 256, (2, 8, 8), np.uint8)
    for i, image in enumerate(images):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    x = normalise(torch.from_numpy(images)[:, None], mae.config.load(DIGITS).data)
    for layout in ("", "timm", "hf", "official/full.pth"):
        if layout:
            assert export.main([str(run), "--format", layout.split("/")[0], f"--out={tmp_path / layout.split('/')[0]}"]) == 0
        target = tmp_path / "vectors" / f"{layout.split('/')[0] or 'run'}.npz"
        words = [str(tmp_path / layout if layout else run), str(tmp_path / "photos"), f"--out={target}"]
        assert features.main([*words, "data.workers=0", "train.precision=fp32"]) == 0
        with np.load(target) as file:
            np.testing.assert_allclose(file["mean"], mae.load(run).encode(x).detach().numpy(), rtol=1e-4, atol=1e-4)
    shown = []
    blank = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(reconstruction_pictures, "draw", lambda subject, pixels, keys: shown.append(pixels) or blank)
    assert reconstruct.main([str(run), str(tmp_path / "photos")]) == 0
    torch.testing.assert_close(shown[0].cpu(), x)


@pytest.mark.parametrize("layout", ["timm", "hf", "official/full.pth", "official/encoder.pth"])
def test_what_is_exported_gives_the_same_features(layout, run, photos, tmp_path):
    target = tmp_path / layout.split("/")[0]
    assert export.main([str(run), "--format", target.name, f"--out={target}"]) == 0
    written, own = (vectors(word, photos, tmp_path / f"{i}.npz") for i, word in enumerate((tmp_path / layout, run)))
    assert set(written) == set(own)
    for pool in ("mean", "cls"):
        np.testing.assert_allclose(written[pool], own[pool], rtol=1e-5, atol=1e-5)


def test_an_export_tells_what_was_measured(run, tmp_path):
    entry = {"protocol": "knn", "data": "photos@1", "split": "test", "encoder": {"name": "photos-mae"}}
    control = {**entry, "encoder": {"name": "control:pixels"}, "metrics": {"accuracy": 12.5, "accuracy_ci95": 2.25, "n_test": 8}}
    entries = [{**entry, "metrics": {"accuracy": 87.5, "accuracy_std": 1.5, "accuracy_ci95": 2.5, "n_test": 8}}, control]
    RunFolder(run).results.write_text(json.dumps(entries))
    assert export.main([str(run), "--format", "timm", "--out", str(tmp_path / "x")]) == 0
    RunFolder(run).results.unlink()
    card = (tmp_path / "x" / "README.md").read_text()
    assert "| nearest neighbours | photos-mae | photos@1, test | 87.5 ± 1.5 (std) | 8 |" in card
    assert "| nearest neighbours | raw pixels | photos@1, test | 12.5 ± 2.2 (95%) | 8 |" in card
    assert "16 x 16 pixels, 3 channels" in card


def pixels_and_vectors(model, count):
    """Images of a number of them, in the model's number format, and what is expected of an export of the model."""
    dtype = model.encoder.pos_embed.dtype
    mean, std = (torch.tensor(getattr(mae.config.load(WORDS).data, name), dtype=dtype).view(-1, 1, 1) for name in ("mean", "std"))
    pixels = torch.rand(count, 3, 16, 16, dtype=dtype)
    with torch.no_grad():
        return pixels, tuple(model.encode((pixels - mean) / std, pool) for pool in ("mean", "cls"))


def test_torch_export_gives_the_same_features_for_any_number_of_images(run, tmp_path):
    assert export.main([str(run), "--format", "torch", "--out", str(tmp_path / "x")]) == 0
    assert 'torch.export.load("encoder.pt2")' in (tmp_path / "x" / "README.md").read_text()
    exported_program.save(mae.load(run).double(), tmp_path, data=mae.config.load(WORDS).data)
    for folder, dtype in ((tmp_path / "x", torch.float32), (tmp_path, torch.float64)):
        program = torch.export.load(folder / "encoder.pt2").module()
        for count in (1, 3):
            pixels, expected = pixels_and_vectors(mae.load(run).to(dtype), count)
            torch.testing.assert_close(tuple(program(pixels)), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.slow
def test_onnx_gives_the_same_features_for_any_number_of_images(run, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    from onnx.reference import ReferenceEvaluator, op_run  # in float64 too, in which the runtime has no convolution

    class Gelu(op_run.OpRun):  # the evaluator's own takes erf in float32
        op_domain = ""

        def _run(self, x, approximate=None):
            return (0.5 * x * (1 + scipy.special.erf(x / 2**0.5)),)

    assert export.main([str(run), "--format", "onnx", "--out", str(tmp_path / "x")]) == 0
    double = mae.load(run).double()
    for module in double.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 2.0**-20  # ONNX keeps an eps in float32 always, which holds this one exactly
    onnx_file.save(double, tmp_path, data=mae.config.load(WORDS).data)
    session = runtime.InferenceSession(str(tmp_path / "x" / "encoder.onnx"))
    for opened, model in ((session, mae.load(run)), (ReferenceEvaluator(str(tmp_path / "encoder.onnx"), new_ops=[Gelu]), double)):
        for count in (1, 3):
            pixels, expected = pixels_and_vectors(model, count)
            found = tuple(map(torch.from_numpy, opened.run(["mean", "cls"], {"images": pixels.numpy()})))
            torch.testing.assert_close(found, expected, rtol=TOLERANCE[pixels.dtype], atol=TOLERANCE[pixels.dtype])


def test_timm_opens_its_export_with_the_same_outputs(run, tmp_path):
    assert export.main([str(run), "--format", "timm", "--out", str(tmp_path / "x")]) == 0
    theirs, images = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval(), torch.randn(2, 3, 16, 16)
    assert (list(theirs.pretrained_cfg["mean"]), theirs.pretrained_cfg["tag"]) == ([0.5, 0.4, 0.3], "photos-mae")
    with torch.no_grad():
        for dtype, tolerance in TOLERANCE.items():
            x, ours = images.to(dtype), mae.load(run).to(dtype)
            torch.testing.assert_close(theirs.to(dtype)(x), ours.encode(x), rtol=tolerance, atol=tolerance)


def finetuned_from(encoder, folder):
    """As fine-tuning leaves an encoder, with its norm after the mean: a bare file as the authors' code writes it, our classifier/."""
    config = mae.config.load(WORDS)
    size, shape = config.image_size, config.encoder.overrides
    model = classifier.finetuned(config.encoder.name, encoder, image_size=size, classes=3, drop_path=0.0, overrides=shape)
    torch.nn.init.normal_(encoder.norm.weight)
    model.fc_norm.load_state_dict(encoder.norm.state_dict())
    torch.save({"model": model.state_dict(), "args": {"num_heads": 4}}, folder / "tuned.pth")
    timm_folder.save(model, folder / "classifier", data=config.data, tag="tuned", classes=("a", "b", "c"))


KINDS = ["run", "timm", "hf", "official/full.pth", "official/encoder.pth", "tuned.pth", "classifier", "fine-tuned run"]


@pytest.mark.parametrize("kind", KINDS)
def test_pretraining_goes_on_from_every_kind_of_encoder(kind, run, tmp_path):
    word, given = str(run), mae.load(run)
    if kind in ("tuned.pth", "classifier", "fine-tuned run"):
        if kind == "fine-tuned run":
            word = str(untrained_run(tmp_path, [*WORDS, "configs/evaluation/finetune_paper.yaml"]))
            with pytest.raises(ConfigError, match="has not come to its end"):
                mae.load(word)
        finetuned_from(given.encoder, tmp_path)
        word = str(tmp_path / kind) if kind != "fine-tuned run" else word
    elif kind != "run":
        assert export.main([word, "--format", kind.split("/")[0], f"--out={tmp_path / kind.split('/')[0]}"]) == 0
        word = str(tmp_path / kind)
    method = _method(mae.config.load([*WORDS, f"encoder.from={word}", "train.seed=1"])).eval()
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(method.encode(images), given.encode(images), rtol=1e-5, atol=1e-5)
        losses = [float(model(images, noise=noise).loss) for model in (method, given)]
    whole = kind in ("run", "hf", "official/full.pth")  # with its decoder, which is taken over
    assert (abs(losses[0] - losses[1]) < 1e-5) is whole
    other = _method(mae.config.load([*WORDS, f"encoder.from={word}", "method.decoder_depth=2"]))
    assert torch.equal(other.encoder.norm.weight, given.encoder.norm.weight)  # another decoder starts afresh


def test_a_crossmae_goes_on_with_its_decoder_and_a_probe_is_no_encoder(tmp_path):
    words = [*WORDS, "configs/methods/crossmae.yaml"]
    run = untrained_run(tmp_path / "cross", words)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    method = _method(mae.config.load([*words, f"encoder.from={run}", "train.seed=1"])).eval()
    with torch.no_grad():
        assert torch.equal(method(images, noise=noise).loss, mae.load(run)(images, noise=noise).loss)
    plain = _method(mae.config.load([*WORDS, f"encoder.from={run}"]))  # whose decoder is another
    assert torch.equal(plain.encoder.norm.weight, method.encoder.norm.weight)
    larger = _method(mae.config.load([*words, f"encoder.from={run}", "data.image_size=[24,32]"]))
    assert torch.equal(larger.decoder.pred.weight, method.decoder.pred.weight)
    probe = untrained_run(tmp_path / "probe", [*WORDS, "configs/evaluation/linear_probe_paper.yaml"])
    with pytest.raises(ConfigError, match="is a probe"):
        mae.load(probe)


def test_training_starts_from_any_encoder_at_the_size_and_channels_of_its_data(tmp_path):
    given = timm.create_model("vit_tiny_patch16_224", num_classes=7, depth=2, embed_dim=64, num_heads=1, img_size=64)
    save_file(given.state_dict(), tmp_path / "given.safetensors")
    method = _method(mae.config.load([f"encoder.from={tmp_path / 'given.safetensors'}", "data.image_size=[32,48]"]))  # grey digits
    assert method.encoder.patch_embed.grid_size == (2, 3)
    assert torch.equal(method.encoder.blocks[1].mlp.fc1.weight, given.blocks[1].mlp.fc1.weight)
    torch.testing.assert_close(method.encoder.patch_embed.proj.weight[:, 0], given.patch_embed.proj.weight.sum(1))
    assert torch.equal(mae.load(tmp_path / "given.safetensors").encoder.blocks[0].norm1.weight, given.blocks[0].norm1.weight)


def test_what_cannot_be_done_is_refused_before_anything_is_made(run, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(onnx_file, "NEEDED", ("no_such_package",))
    conv = [w for w in WORDS if not w.startswith("encoder.")] + ["configs/methods/ae.yaml", "encoder.name=conv", "encoder.patch_size=4"]
    untrained_run(tmp_path / "conv", conv)
    (tmp_path / "empty").mkdir()
    target, taken = str(tmp_path / "x"), str(photos)
    for tool, words, answer in (
        (export, [run, "--format", "onx", "--out", target], "onx is unknown"),
        (export, [run, "--out", target], "--format is missing"),
        (export, [run, "--format", "onnx", "--out", target], "pip install no_such_package"),
        (export, [run, "--format", "hf", "--out", taken], "exists already"),
        (export, [run, "--format", "hf", "--out", target, "train.steps=3"], "cannot be changed here"),
        (export, [run, "--format", "hf", "--out", target, "--quick"], "no option here"),
        (export, [tmp_path / "conv", "--format", "hf", "--out", target], "ConvEncoder has no place"),
        (export, [tmp_path / "conv", "--format", "timm", "--out", target], "timm has no ConvEncoder"),
        (features, [run, "--out", f"{target}.npz"], "ENCODER DIR --out"),
        (features, [run, photos, "--out", target], "does not end in .npz"),
        (features, [run, tmp_path / "empty", "--out", f"{target}.npz"], "holds no images"),
        (features, [run, tmp_path / "no", "--out", f"{target}.npz"], "is no folder"),
        (features, [run, photos, "--out", f"{target}.npz", "data.image_size=17"], "not a multiple"),
        (features, [photos, photos, "--out", f"{target}.npz"], "neither a run folder"),
    ):
        before = sorted(tmp_path.rglob("*"))
        assert tool.main([str(word) for word in words]) == 2
        error = capsys.readouterr().err.strip()
        assert answer in error
        assert len(error.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_the_tools_are_listed():
    assert {"export", "features"} <= set(TOOLS)
