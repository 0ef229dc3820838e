"""Corruptions are pure functions of keys at their stated rates; the denoising autoencoder learns the clean image behind them."""

import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mae
from mae.errors import ConfigError
from mae.methods.denoising import SHARES, STRENGTHS
from mae.nets import corruption, vit

SMALL = ["configs/methods/denoising.yaml", "data.image_size=8", "data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
SMALL += ["encoder.patch_size=4", "encoder.embed_dim=32", "encoder.depth=1", "encoder.num_heads=2"]
FUNCTIONS = {name: getattr(corruption, name) for name in STRENGTHS if name != "patch_pca"}
FUNCTIONS["patch_dropout"] = partial(corruption.patch_dropout, patch=(2, 2))


def small(*words):
    return mae.create([*SMALL, *words])


def inputs(count=16, channels=3, size=(8, 8)):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def fitted(images, components, times=1):
    pca = corruption.PatchPCA(patch=(2, 2), values=4 * images.shape[1], components=components)
    for _ in range(times):
        for batch in images.chunk(4):
            pca.update(batch)
    return pca


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(STRENGTHS)),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    channels=st.integers(1, 3),
    count=st.integers(2, 5),
    kind=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_corruption_is_a_function_of_the_image_and_its_key_alone(name, size, channels, count, kind):
    images, keys = inputs(count, channels, (2 * size[0], 2 * size[1]))
    corrupt = fitted(images, components=2) if name == "patch_pca" else FUNCTIONS[name]
    images = images.to(kind)
    together = corrupt(images, keys, 0.5)
    assert (together.shape, together.dtype) == (images.shape, kind)
    alone = torch.cat([corrupt(images[i : i + 1], keys[i : i + 1], 0.5) for i in range(count)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    assert torch.equal(corrupt(images.flip(0), keys.flip(0), 0.5).flip(0), together)


@pytest.mark.parametrize("name", SHARES)
def test_the_share_that_is_replaced_is_the_strength_and_keys_differ(name):
    images, keys = inputs(count=500)
    strength = STRENGTHS[name]
    corrupted = FUNCTIONS[name](images, keys, strength)
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    values = [(corrupted == low) & (images != low), (corrupted == high) & (images != high)] if name == "salt_pepper" else [corrupted == 0]
    changed = corrupted != images
    # all channels of a pixel together (an extreme replaced by itself shows as no change), all pixels of a patch together
    for value in values:
        share, draws = strength / len(values), 500 * (16 if name == "patch_dropout" else 64)
        assert abs(float(value.float().mean()) - share) < 5 * (share * (1 - share) / draws) ** 0.5 + share / 64 * (len(values) - 1)
    assert torch.equal(sum(v.int() for v in values).bool(), changed)
    if name != "salt_pepper":
        assert torch.equal(changed, changed[:, :1].expand_as(changed))
    if name == "patch_dropout":
        patches = vit.patchify(changed.float(), (2, 2))
        assert ((patches.mean(-1) == 0) | (patches.mean(-1) == 1)).all()
    assert not torch.equal(changed[0], changed[1])


def test_gaussian_noise_has_the_stated_variance_and_leaves_no_trace_of_the_image():
    images, keys = inputs(count=500)
    noise = (corruption.gaussian(images, keys, 0.7) - images).double()
    count = noise.numel()
    assert abs(float(noise.mean())) < 5 * 0.7 / count**0.5
    assert abs(float(noise.var()) / 0.49 - 1) < 5 * (2 / count) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten(), images.double().flatten()]))[0, 1])) < 5 / count**0.5


def test_patch_pca_finds_the_principal_components_of_all_patches_seen_and_noises_them_alone():
    images, keys = inputs(count=400)
    images = images.cumsum(2).cumsum(3) + torch.linspace(0, 3, 400)[:, None, None, None]  # batches differ in their means
    pca = fitted(images, components=3, times=20)
    patches = vit.patchify(images, (2, 2)).flatten(0, 1)
    torch.testing.assert_close(pca.covariance, patches.T.cov(correction=0), rtol=1e-4, atol=1e-3)
    values, vectors = torch.linalg.eigh(patches.double().T.cov(correction=0))
    cosines = torch.linalg.svdvals(vectors[:, -3:].T @ pca.directions.double())
    assert cosines.min() > 0.999
    noise = vit.patchify(pca(images, keys, 0.5) - images, (2, 2)).double()
    inside = noise @ pca.directions.double()
    torch.testing.assert_close(inside @ pca.directions.double().T, noise, rtol=0, atol=1e-4)
    expected = 0.25 * float(values[-3:].mean())
    assert abs(float(inside.var()) / expected - 1) < 5 * (2 / inside.numel()) ** 0.5
    assert torch.equal(pca(images, keys, 0.0), images)


def test_patch_pca_of_two_ranks_is_that_of_one(monkeypatch):
    images, _ = inputs(count=16)
    alone = fitted(images, components=2)
    barrier, said, ranks = threading.Barrier(2), {}, [corruption.PatchPCA(patch=(2, 2), values=12, components=2) for _ in range(2)]

    def mean_of_both(x):
        said[threading.get_ident()] = x
        barrier.wait()
        result = sum(said.values()) / 2
        barrier.wait()
        return result

    def train(rank):
        for batch in images.chunk(4):
            ranks[rank].update(batch.chunk(2)[rank])

    monkeypatch.setattr(corruption, "global_mean", mean_of_both)
    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for name, value in alone.state_dict().items():
        assert torch.equal(ranks[0].state_dict()[name], ranks[1].state_dict()[name])
        torch.testing.assert_close(ranks[0].state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STRENGTHS)
def test_the_clean_image_is_the_target_and_duplicating_the_batch_changes_nothing(name, monkeypatch):
    method = small(f"method.corruption={name}")
    images, keys = inputs()
    method(images, keys=keys)  # patch_pca takes its components from training
    method.eval()
    output = method(images, keys=keys)
    made = method.reconstruct(method.corrupt(images, keys=keys))
    torch.testing.assert_close(output.loss, (made - images).square().flatten(1).sum(1).mean())
    torch.testing.assert_close(method(images.repeat(2, 1, 1, 1), keys=keys.repeat(2)).loss, output.loss)
    assert output.metrics["corruption_per_pixel"] > 0.05
    monkeypatch.setattr(method, "reconstruct", lambda corrupted: images)
    assert method(images, keys=keys).loss == 0


@pytest.mark.parametrize(
    "words",
    [
        *([f"method.corruption={name}"] for name in STRENGTHS),
        ["encoder.reg_tokens=2"],
        ["encoder.class_token=false"],
        ["encoder.name=conv", "method.corruption=patch_pca"],
        ["encoder.name=dense"],
    ],
    ids=" ".join,
)
def test_it_learns_in_bf16_and_every_parameter_does(words):
    torch.manual_seed(0)
    method = small(*words)
    images, keys = inputs()
    images = images.cumsum(2).cumsum(3) / 4
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            output = method(images, keys=keys)
        optimizer.zero_grad()
        output.loss.backward()
        if not history:
            assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        history.append(float(output.loss.detach()))
    assert all(map(torch.isfinite, torch.tensor(history)))
    assert min(history[-3:]) < 0.8 * history[0]
    assert all(v.ndim == 0 and not v.requires_grad for v in output.metrics.values())
    assert method.encode(images).shape == (16, 32)


def test_components_are_state_that_only_training_changes():
    method = small("method.corruption=patch_pca", "method.pca_components=3")
    images, keys = inputs()
    before = {k: v.clone() for k, v in method.corruption.state_dict().items()}
    method.eval()(images, keys=keys)
    assert all(torch.equal(v, before[k]) for k, v in method.corruption.state_dict().items())
    method.train()(images, keys=keys)
    assert method.corruption.directions.shape == (48, 3)
    other = small("method.corruption=patch_pca", "method.pca_components=3")
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.corrupt(images, keys=keys), method.corrupt(images, keys=keys))
    assert method.batch_statistics
    assert not small().batch_statistics


def test_diagnosis_compares_with_copying_and_with_the_mean_image(monkeypatch):
    method, (images, keys) = small().eval(), inputs(count=64)
    batches = [(images[:40], keys[:40]), (images[40:], keys[40:])]

    def diagnosed(reconstruct):
        monkeypatch.setattr(method, "reconstruct", reconstruct)
        return method.diagnose(batches)

    zero = diagnosed(torch.zeros_like)
    assert "mean image" in zero.alarms[0]
    variance = (images - images.mean(0)).square().sum()
    assert zero.figures["denoising_r2_1"] == pytest.approx(float(1 - images.square().sum() / variance), abs=1e-5)
    assert set(zero.figures) == {f"{made}_r2_{s}" for made in ("denoising", "copying") for s in ("0.5", "1", "2")}
    best = diagnosed(lambda corrupted: corrupted / 2)  # of unit variance and noise: explains half
    assert best.alarms == []
    assert best.figures["denoising_r2_1"] == pytest.approx(0.5, abs=0.05)
    assert best.figures["copying_r2_2"] == pytest.approx(-3, abs=0.2)
    weak = small("method.strength=0.05").eval()
    monkeypatch.setattr(weak, "reconstruct", lambda corrupted: corrupted)
    copying, identity = weak.diagnose(batches).alarms
    assert "raise method.strength" in copying
    assert "identity" in identity


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["method.corruption=blur"], "choose one of gaussian"),
        (["method.strength=0"], "above 0"),
        (["method.corruption=pixel_dropout", "method.strength=1"], "between 0 and 1"),
        (["method.corruption=patch_dropout", "encoder.name=dense"], "choose pixel_dropout"),
        (["method.corruption=patch_pca", "method.pca_components=49"], "from 1 to 48"),
    ],
)
def test_bad_settings_are_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        small(*words)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gaussian", "salt_pepper", "patch_pca"])
def test_it_compiles_to_one_graph(name):
    method, (images, keys) = small(f"method.corruption={name}"), inputs()
    state = {k: v.clone() for k, v in method.state_dict().items()}
    expected = method(images, keys=keys).loss
    method.load_state_dict(state)
    torch.testing.assert_close(torch.compile(method, backend="aot_eager", fullgraph=True)(images, keys=keys).loss, expected)
