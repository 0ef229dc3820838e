"""Properties of the sparse autoencoder, on images and on a frozen encoder's tokens."""

import math

import pytest
import torch
from descent import descend
from ranks import on_ranks, trained

import mae
from mae.errors import ConfigError
from mae.methods.sparse import divergence
from mae.nets.dictionary import Dictionary, largest

SMALL = ["configs/methods/sparse.yaml", "method.expansion=8", "encoder.embed_dim=32", "encoder.depth=1"]
KINDS = ["topk", "l1", "kl"]


def small(*words):
    return mae.create([*SMALL, *words])


def inputs(count=16):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count)


@pytest.mark.parametrize("k", [1, 4, 40])
def test_exactly_k_units_are_active(k):
    method, (images, keys) = small(f"method.k={k}"), inputs()
    code = method.latent(images)
    assert code.shape == (16, 16, 256)
    assert (code > 0).sum(-1).unique().tolist() == [k]
    assert small("method.expansion=auto").dictionary.units == 64  # around an encoder that learns
    drive = method.dictionary.read(method.standardise.as_seen(method._patches(method.encoder.forward_features(images))))
    assert torch.equal(code.amin(-1) >= 0, torch.ones(16, 16, dtype=torch.bool))
    torch.testing.assert_close(code.sum(-1), drive.topk(k).values.sum(-1))
    assert method(images, keys=keys).metrics["l0"] == k
    assert torch.equal(largest(-torch.ones(2, 5), 3), torch.zeros(2, 5))  # what is negative is never active


def test_atoms_have_unit_norm_whatever_the_parameters_do_and_no_gradient_along_themselves():
    dictionary = Dictionary(20, 8, unit_rows=False)
    code, slope = torch.rand(2, 3, 20), torch.randn(2, 3, 8)
    before = dictionary(code)
    (before * slope).sum().backward()
    along = (dictionary.atoms.grad * dictionary.atoms).sum(1)
    torch.testing.assert_close(along, torch.zeros(20), atol=1e-5, rtol=0)
    assert dictionary.atoms.grad.norm() > 0.1
    with torch.no_grad():
        dictionary.atoms.mul_(7)
    torch.testing.assert_close(dictionary.directions().norm(dim=1), torch.ones(20))
    torch.testing.assert_close(dictionary(code), before)


def test_the_price_of_l1_cannot_be_lowered_by_scale():
    """Longer atoms, or on images longer rows, change nothing."""
    method, (images, keys) = small("method.kind=l1").eval(), inputs()
    loss = method(images, keys=keys).loss
    with torch.no_grad():
        method.dictionary.atoms.mul_(3)
        method.dictionary.rows.mul_(0.1)
    torch.testing.assert_close(method(images, keys=keys).loss, loss)


def test_l1_makes_codes_sparser():
    active = []
    for price in (0.0, 1.0):
        method, (images, keys) = small("method.kind=l1", f"method.l1={price}"), inputs()
        descend(method, images, keys, 40)
        active.append(float(method(images, keys=keys).metrics["l0"]))
    assert active[1] < 0.5 * active[0]


def test_the_divergence_from_rho_is_torchs_and_pulls_every_unit_towards_rho():
    mean = torch.tensor([0.01, 0.05, 0.3], requires_grad=True)
    price = divergence(0.05, mean)
    coins = [torch.distributions.Bernoulli(p) for p in (torch.tensor(0.05), mean)]
    torch.testing.assert_close(price, torch.distributions.kl_divergence(*coins), atol=1e-6, rtol=1e-4)
    slope = torch.autograd.grad(price.sum(), mean)[0]
    assert slope[0] < 0 < slope[2]
    assert slope[1] == pytest.approx(0, abs=1e-5)

    method, (images, keys) = small("method.kind=kl").eval(), inputs()
    means = method.latent(images).mean((0, 1)).clamp(1e-6, 1 - 1e-6)
    without = small("method.kind=kl", "method.beta=0").eval()
    torch.testing.assert_close(
        method(images, keys=keys).loss - without(images, keys=keys).loss, 3 * 16 * divergence(0.05, means).sum(), rtol=1e-4, atol=1e-2
    )


def test_units_are_dead_after_so_many_tokens_and_come_back_by_what_is_missing():
    method, (images, keys) = small("method.dead_after=300", "method.k=2", "method.expansion=2"), inputs()
    dead = 2 * torch.arange(8)
    with torch.no_grad():
        drive = method.dictionary.read(method.standardise(method._patches(method.encoder.forward_features(images))))
        method.dictionary.threshold[dead] = 0.05 - drive.amax((0, 1))[dead]  # active somewhere, but never among the largest
    assert method(images, keys=keys).metrics["dead_share"] == 0  # 256 tokens
    assert method.silent[dead].tolist() == [256] * 8
    assert float(method(images, keys=keys).metrics["dead_share"]) >= 8 / 64
    method.zero_grad()
    method(images, keys=keys).loss.backward()
    helped = method.dictionary.atoms.grad[dead].norm(dim=1)
    assert (helped > 0).any()  # a dead unit's atom learns
    method.silent.zero_()
    method.zero_grad()
    method(images, keys=keys).loss.backward()
    assert torch.equal(method.dictionary.atoms.grad[dead], torch.zeros(8, 32))  # and would not, were it alive
    method.eval()
    before = method.silent.clone()
    method(images, keys=keys)
    assert torch.equal(method.silent, before)


def test_dead_units_come_into_use_by_the_auxiliary_loss_alone():
    revived = []
    for weight in (0, 1 / 32):
        words = ["encoder.frozen=true", "method.dead_after=300", "method.k=2", "method.expansion=2", f"method.aux_weight={weight}"]
        method, (images, keys), dead = small(*words), inputs(), torch.arange(0, 64, 2)
        with torch.no_grad():
            drive = method.dictionary.read(method.standardise(method._patches(method.encoder.forward_features(images))))
            method.dictionary.threshold[dead] = 0.2 - drive.amax((0, 1))[dead]  # active somewhere, but never among the largest
        descend(method, images, keys, 60)
        revived.append(int((method.silent[dead] == 0).sum()))
    assert revived[0] == 0
    assert revived[1] >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_twice_is_a_batch_once(kind):
    method, (images, keys) = small(f"method.kind={kind}").eval(), inputs()
    once, twice = (method(images.repeat(n, 1, 1, 1), keys=keys.repeat(n)).loss for n in (1, 2))
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("frozen", ["false", "true"], ids=["images", "tokens"])
def test_the_loss_falls_and_every_parameter_learns(kind, dtype, frozen):
    method, (images, keys) = small(f"method.kind={kind}", f"encoder.frozen={frozen}"), inputs()
    encoder = [p.clone() for p in method.encoder.parameters()]
    losses = descend(method, images, keys, 30, dtype=dtype)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < 0.8 * losses[0]
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    if kind == "kl":  # near rho on the mean, and not at every token
        assert method.diagnose([(images, keys)]).figures["hoyer"] > 0.5
    if frozen == "true":
        assert all(torch.equal(*pair) for pair in zip(encoder, method.encoder.parameters(), strict=True))


def test_a_dictionary_of_a_frozen_encoder_explains_its_tokens_and_makes_no_images():
    method, (images, keys) = small("encoder.frozen=true", "method.k=16"), inputs(64)
    assert not hasattr(method, "reconstruct")
    assert not hasattr(method, "decode")
    assert not hasattr(method, "decoder")
    before = method.diagnose([(images, keys)]).figures["r2"]
    descend(method, images, keys, 100)
    figures = method.diagnose([(images[:40], keys[:40]), (images[40:], keys[40:])]).figures
    assert figures["r2"] > max(before + 0.1, 0.5)
    assert figures["l0"] == 16
    whole = method.diagnose([(images, keys)]).figures
    assert {k: pytest.approx(v, rel=1e-4) for k, v in whole.items()} == figures
    assert method.encode(images, pool="latent").shape == (64, 16 * 256)  # few enough to be taken whole


def test_on_images_codes_decode_to_the_reconstruction():
    method, (images, _) = small().eval(), inputs()
    assert torch.equal(method.decode(method.latent(images)), method.reconstruct(images))
    assert method.reconstruct(images).shape == images.shape
    conv = small("encoder.name=conv", "encoder.patch_size=4")
    assert conv.latent(images).shape == (16, 4, 256)
    assert conv.reconstruct(images).shape == images.shape


def train_small(kind, rank, world):
    """Three steps; what must not depend on how the batch is spread."""
    method = small(f"method.kind={kind}", "method.dead_after=200", "method.beta=1")
    losses, metrics = trained(method, *inputs(8), rank, world, 3, 1e-4)
    return {"losses": losses, "silent": method.silent, "dead_share": metrics["dead_share"], "atoms": method.dictionary.atoms.detach()}


def train_both(rank, world):
    return {f"{kind}/{name}": value for kind in ("topk", "kl") for name, value in train_small(kind, rank, world).items()}


def test_two_ranks_are_one_with_the_batch_of_both(tmp_path):
    both, one = on_ranks(train_both, tmp_path, 2), train_both(0, 1)
    for name, value in one.items():
        found = (both[0][name] + both[1][name]) / 2 if name.endswith("losses") else both[0][name]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=name)
    assert one["topk/dead_share"] > 0
    assert not torch.allclose(both[0]["kl/losses"], both[1]["kl/losses"])  # each saw its own images


def test_alarms_say_what_is_wrong():
    method, (images, keys) = small("method.kind=l1"), inputs()
    with torch.no_grad():
        method.dictionary.threshold.fill_(10.0)
    assert any("not sparse" in alarm and "raise method.l1" in alarm for alarm in method.diagnose([(images, keys)]).alarms)
    with torch.no_grad():
        method.dictionary.threshold.fill_(-100.0)
    figures, alarms = method.diagnose([(images, keys)])
    assert figures["dead_share"] == 1
    assert figures["l0"] == 0
    assert any("100% of the 256 units are dead" in alarm for alarm in alarms)
    assert any("explains" in alarm for alarm in alarms)
    method = small("method.kind=kl")
    with torch.no_grad():
        method.dictionary.rows.zero_()
    dull = method.diagnose([(images, keys)]).alarms
    assert [text in " ".join(dull) for text in ("not sparse", "100% of the 256 units are dead")] == [True, True]


def test_the_images_that_activate_an_atom_most_come_first():
    method, (images, keys) = small("encoder.frozen=true"), inputs(20)
    code = method.latent(images)
    top = method.top_images([(images[:8], keys[:8]), (images[8:], keys[8:])], atoms=5, count=3)
    assert top.images.shape == (5, 3, 1, 8, 8)
    assert top.atoms.tolist() == code.sum((0, 1)).topk(5).indices.tolist()
    for atom, shown, places, activations in zip(top.atoms, top.images, top.places, top.activations, strict=True):
        strongest = code[..., atom].amax(1)
        best = strongest.argsort(descending=True)[:3]
        assert torch.equal(shown, images[best])
        torch.testing.assert_close(activations, code[best, places, atom])
        torch.testing.assert_close(activations, strongest[best])
    with pytest.raises(ConfigError, match="1 to 20 images"):
        method.top_images([(images, keys)], atoms=5, count=21)


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("method.k=257", "1 to the 256 units"),
        ("method.k=0", "at least 1"),
        ("method.k=4.5", "k 4.5 is no whole number"),
        ("method.expansion=1.5", "expansion 1.5 is no whole number"),
        ("method.k_aux=1000", "raise method.expansion"),
        ("method.kind=lasso", "topk, l1, kl"),
        ("method.expansion=0", "above 0"),
        ("method.aux_weight=-1", "at least 0"),
        ("method.l1=-0.1", "at least 0"),
        ("method.beta=-1", "at least 0"),
        ("method.rho=1", "above 0 and below 1"),
        ("method.dead_after=0", "the default is auto"),
    ],
)
def test_bad_settings_are_refused(word, way_out):
    with pytest.raises(ConfigError, match=way_out):
        small(word)
