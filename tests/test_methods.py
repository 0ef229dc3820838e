"""What every method of configs/methods promises: found by its files, schema = constructor, learns bare on digits, nothing left over."""

import copy
import importlib
import inspect
import math

import numpy as np
import pytest
import torch
from ranks import on_ranks, trained
from torch.utils.flop_counter import FlopCounterMode

import mae
from mae import config
from mae.commands import pretrain
from mae.data.sources import open_splits
from mae.errors import ConfigError
from mae.evaluation import diagnosis, features, reconstruction
from mae.methods.build import class_in
from mae.training import flops

NAMES = sorted(p.stem for p in (config.configs_folder() / "methods").glob("*.yaml"))
LEARNING = [name for name in NAMES if name not in ("pca", "pixels", "untrained")]


def words(name, *more):
    return [f"configs/methods/{name}.yaml", "encoder.depth=2", "encoder.embed_dim=32", *more]


@pytest.fixture(scope="module")
def images():
    cfg = config.load([])
    splits = open_splits(cfg.data)
    pixels = torch.stack([torch.from_numpy(splits.train.read(i)).permute(2, 0, 1) for i in range(64)])
    return (pixels / 255 - cfg.data.mean[0]) / cfg.data.std[0]


def train(method, images, steps, dtype=None):
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for step in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = method(images, keys=torch.arange(len(images)) + 1000 * step).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_every_relative_is_there():
    expected = "pixels untrained pca ae denoising sparse contractive vae beta_vae vq_vae kl_ae mae crossmae"
    assert set(expected.split()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_lists_every_argument_with_its_default(name):
    module = importlib.import_module(f"mae.methods.{name}")
    makers = [getattr(module, "create", None) or class_in(module)]
    if any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(makers[0]).parameters.values()
    ):  # the others are those of the class it sets up
        makers.insert(0, type(mae.create(words(name))))
    parameters = [p for maker in makers for p in inspect.signature(maker).parameters.values()]
    arguments = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert config.schema("method", name) == {"name": name, **arguments}
    documented = config.docs("method", name)
    assert documented.keys() >= arguments.keys()


@pytest.mark.parametrize("name", LEARNING)
def test_every_parameter_learns_and_the_loss_falls(name, images):
    method = mae.create(words(name)).train()
    output = method(images, keys=torch.arange(len(images)))
    output.loss.backward()
    assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(v.ndim == 0 and not v.requires_grad for v in output.metrics.values())
    losses = train(mae.create(words(name)).train(), images, 40)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_loss_is_finite_and_falls_in_half_precision(name, dtype, images):
    losses = train(mae.create(words(name)).train(), images, 25, dtype)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize("name", LEARNING)
def test_a_loss_depends_on_nothing_but_images_and_keys(name, images):
    keys = torch.arange(len(images))
    losses = []
    for seed in (1, 2):
        method = mae.create(words(name)).train()
        torch.manual_seed(seed)
        losses.append(method(images, keys=keys).loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", [n if n == "vq_vae" else pytest.param(n, marks=pytest.mark.slow) for n in LEARNING])
def test_every_training_step_costs_what_is_counted(name):
    method = mae.create(words(name)).train()
    counted = flops.per_image(method, lambda m, x, keys: m(x, keys=keys), (1, 8, 8))
    counter = FlopCounterMode(display=False)
    for child in method.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False  # it counts as its products
    for _ in range(2):  # the first may do what no other does
        with counter:
            method(torch.randn(8, 1, 8, 8), keys=torch.arange(8)).loss.backward()
    assert counted == counter.get_total_flops() / 8


@pytest.mark.parametrize("name", LEARNING)
def test_a_batch_twice_has_the_loss_of_the_batch_once(name, images):
    method, keys = mae.create(words(name, "encoder.depth=1")).train(), torch.arange(16)
    method(images[:16], keys=keys)  # what starts with the first batch has started
    once, twice = (copy.deepcopy(method)(images[:16].repeat(n, 1, 1, 1), keys=keys.repeat(n)).loss for n in (1, 2))
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def losses_of_all(rank, world):
    generator = torch.Generator().manual_seed(0)
    images, keys = torch.randn(32, 1, 8, 8, generator=generator), torch.arange(32)
    return {name: trained(mae.create(words(name)).train(), images, keys, rank, world, 3, 1e-4)[0] for name in LEARNING}


def test_two_ranks_lose_what_one_does(tmp_path):
    first, second = on_ranks(losses_of_all, tmp_path, 2)
    for name, losses in losses_of_all(0, 1).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, losses, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_features_are_deterministic_and_a_code_goes_back_to_an_image(name, images):
    method = mae.create(words(name)).eval()
    if hasattr(method, "fit"):
        method.fit([(images, None)])
    with torch.no_grad():
        assert torch.equal(method.encode(images), method.encode(images))
        if hasattr(method, "code"):
            assert method.encode(images, "latent").shape[0] == len(images)
            assert_read_in_one_pass(method, images)
        if hasattr(method, "decode"):
            assert method.decode(method.latent(images)).shape == images.shape
        if hasattr(method, "reconstruct"):
            assert method.reconstruct(images).shape == images.shape


def assert_read_in_one_pass(method, images):
    pools, calls = features.pools_of(method), []
    method.encoder.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    found = features.encode_all(method, images, pools)
    assert len(calls) == 1
    assert all(torch.equal(found[pool], method.encode(images, pool)) for pool in pools)
    found = features.encode_all(method, images, pools, also=(features.LAYERS,))
    assert all(torch.equal(found[pool], method.encode(images, pool)) for pool in pools)


@pytest.mark.parametrize("name", NAMES)
def test_every_method_is_diagnosed(name):
    cfg = config.load(words(name))
    found = diagnosis.diagnose(mae.create(words(name)), open_splits(cfg.data), cfg, device="cpu", limit=64)
    assert found.figures["feature_rank"] > 0
    assert all(math.isfinite(v) for v in found.figures.values())
    if name in LEARNING:
        assert any("not left the plateau" in s for s in found.sentences)


def test_collapsed_features_are_told():
    cfg = config.load(words("mae"))
    method = mae.create(words("mae"))
    torch.nn.init.zeros_(method.encoder.norm.weight)
    found = diagnosis.diagnose(method, open_splits(cfg.data), cfg, device="cpu", limit=64)
    assert not found.learning
    assert any("features have collapsed" in s for s in found.sentences)


def test_remembering_is_told(monkeypatch):
    cfg, found = config.load(words("mae")), []
    for gap in (0.2, 0.3):
        report = reconstruction.Report({"generalisation_gap": gap, "explained_variance_target": 0.5}, "", learning=True)
        monkeypatch.setattr(diagnosis.reconstruction, "held_out", lambda *_, report=report, **__: report)
        found.append(diagnosis.diagnose(mae.create(words("mae")), open_splits(cfg.data), cfg, device="cpu", limit=16).sentences)
    assert found[0] == []
    assert "remembers rather than generalises: 80% of the variance explained on training images, 50% on held-out ones" in found[1][0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["configs/methods/ae.yaml", "method.bottleneck_size=100"], "no bottleneck"),
        (["configs/methods/ae.yaml", "encoder.embed_dim=16", "encoder.num_heads=2"], "encoder is 16 wide"),
        (["configs/methods/ae.yaml", "method.loss=bce"], "set mean to 0 and std to 1"),
        (["configs/methods/mae.yaml", "method.decoder_depth=-1"], "must not be below 0"),
        (["configs/methods/ae.yaml", "method.decoder_heads=0"], "leave them at auto"),
        (["configs/methods/pca.yaml", "method.components=65"], "from 1 to the 64 values"),
        (["configs/methods/pixels.yaml", "method.side=0"], "at least 1"),
        (["configs/methods/crossmae.yaml", "encoder.name=conv"], "choose a ViT"),
        (["configs/methods/ae.yaml", "encoder.name=conv", "data.image_size=9", "encoder.patch_size=3"], "a power of two"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(words, says):
    with pytest.raises(ConfigError, match=says) as error:
        mae.create(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("more", [["method.bottleneck=token", "method.bottleneck_size=2"], ["encoder.name=conv"]], ids=" ".join)
def test_an_autoencoder_takes_pixels_as_probabilities(more):
    torch.manual_seed(0)
    method = mae.create(words("ae", "method.loss=bce", "data.mean=[0]", "data.std=[1]", *more)).train()
    digits = open_splits(config.load([]).data).train
    pixels = torch.stack([torch.from_numpy(digits.read(i)).permute(2, 0, 1) for i in range(64)]) / 255
    made = method.reconstruct(pixels)
    expected = torch.nn.functional.binary_cross_entropy(made, pixels, reduction="sum") / len(pixels)
    torch.testing.assert_close(method(pixels, keys=torch.arange(64)).loss, expected, rtol=1e-5, atol=1e-5)
    losses = train(method, pixels, 30)
    assert losses[-1] < 0.9 * losses[0]


def test_cross_entropy_refuses_arrays_that_are_no_probabilities(tmp_path, monkeypatch, capsys):
    for i, white in enumerate((1.0, 1.0, 1.0, 1.5)):
        np.save(tmp_path / f"{i}.npy", np.full((8, 8), white, np.float32))
    given = ["configs/methods/ae.yaml", "method.loss=bce", "data.name=arrays", f"data.path={tmp_path}", "data.channels=1"]
    given += ["data.image_size=8", "data.mean=[0]", "data.std=[1]", "data.validation=0.01", "encoder.patch_size=2", "run.dir=run"]
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(given) == 2
    assert "3.npy holds 1.5: scale the arrays" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    np.save(tmp_path / "3.npy", np.full((8, 8), 65535, np.uint16))  # scaled by its type
    cfg = config.load(given)
    pretrain._check_probabilities(cfg, open_splits(cfg.data).train)


def test_the_docs_name_every_method():
    text = (config.configs_folder().parent / "docs" / "methods.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []
