"""Properties of the vector-quantised autoencoder and the prior over its codes."""

import math

import pytest
import torch
from descent import descend
from ranks import on_ranks, trained

import mae
from mae import config
from mae.errors import ConfigError
from mae.nets import prior
from mae.nets.standardise import Standardise
from mae.training import checkpoint, optim, state

SMALL = ["configs/methods/vq_vae.yaml", "encoder.embed_dim=32", "encoder.depth=1", "method.code_width=8"]


def small(*words):
    return mae.create([*SMALL, "method.codebook_size=16", *words])


def stripes(count=32):
    """Images (B, 1, 8, 8) of a few kinds of patches, and their keys."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(6, 2, 2, generator=generator)
    chosen = kinds[torch.randint(6, (count, 4, 4), generator=generator)]  # (B, 4, 4, 2, 2)
    return chosen.permute(0, 1, 3, 2, 4).reshape(count, 1, 8, 8), torch.arange(count)


def latents(count=64, places=8, width=4, seed=0):
    return torch.randn(count, places, width, generator=torch.Generator().manual_seed(seed)), torch.arange(count)


def test_latents_are_standardised_by_the_batch_and_later_by_what_was_seen():
    z, _ = latents()
    layer = Standardise(4)
    for _ in range(3):
        made = layer(3 * z + 100)
    torch.testing.assert_close(made.mean((0, 1)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.std((0, 1), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(layer.as_seen(3 * z + 100), made, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(layer.eval()(3 * z + 100), made, atol=1e-3, rtol=1e-3)


def test_looking_changes_nothing_in_training_mode():
    method, images, keys = small().train(), *stripes()
    method(images, keys=keys)
    before = {k: v.clone() for k, v in method.state_dict().items()}
    method.reconstruct(5 * images)
    method.diagnose([(5 * images, keys)])
    assert all(torch.equal(v, before[k]) for k, v in method.state_dict().items())


def train_small(rank, world):
    """Four steps with restarts; what must not depend on how the batch is spread."""
    found = {}
    for kind in ("ema", "gradient"):
        method = small(f"method.codebook={kind}", "method.decay=0.5", "method.restart_below=0.3")
        losses, metrics = trained(method, *stripes(8), rank, world, 4, 0.05)
        state = {"losses": losses, "perplexity": metrics["perplexity"], **method.quantiser.state_dict(), "variance": method.variance}
        found |= {f"{kind}/{name}": value for name, value in state.items()}
    return found


def test_two_ranks_are_one_with_the_batch_of_both(tmp_path):
    both, one = on_ranks(train_small, tmp_path, 2), train_small(0, 1)
    for name, value in one.items():
        found = (both[0][name] + both[1][name]) / 2 if name.endswith("losses") else both[0][name]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=name)
        if not name.endswith("losses"):
            assert torch.equal(both[0][name], both[1][name])
    assert one["ema/started"]
    assert one["ema/perplexity"] > 2


@pytest.mark.parametrize("kind", ["ema", "gradient", "fsq"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_loss_falls_and_every_parameter_learns(kind, dtype):
    method = small(f"method.codebook={kind}")
    images, keys = stripes()
    losses = descend(method, images, keys, 40, dtype=dtype)
    assert all(map(math.isfinite, losses))
    assert sum(losses[-5:]) < 0.7 * sum(losses[1:6])
    missing = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    method.eval()
    assert torch.equal(method.decode(method.latent(images)), method.reconstruct(images))
    assert method.diagnose([(images, keys)]).figures["perplexity"] > 1.5


def test_a_batch_twice_is_a_batch_once_and_the_variance_stays():
    method, images, keys = small().eval(), *stripes()
    once, twice = (method(images.repeat(n, 1, 1, 1), keys=keys.repeat(n)).loss for n in (1, 2))
    torch.testing.assert_close(once, twice)
    method.train()
    method(images, keys=keys)
    torch.testing.assert_close(method.variance, images.var(correction=0))
    method(5 * images, keys=keys)
    torch.testing.assert_close(method.variance, images.var(correction=0))


def test_a_first_batch_without_variance_decides_nothing():
    method, (images, keys) = small().train(), stripes()
    method(torch.full_like(images, 0.5), keys=keys)
    method(images, keys=keys)
    torch.testing.assert_close(method.variance, images.var(correction=0))


def test_the_average_of_the_weights_has_the_average_of_codes_and_moments(tmp_path):
    method, (images, keys) = small().train(), stripes()
    average, settings = optim.Average(method, 0.9), config.load(SMALL).optim
    expected = {n: b.clone() for n, b in method.named_buffers() if n in average.buffers}
    assert {"quantiser.vectors", "quantiser.shares", "standardise.mean", "standardise.variance", "variance"} < expected.keys()
    for step in range(3):
        method((1 + step) * images, keys=keys)
        average.update(torch.ones(()) if step else None)  # as the host, and as a device that knows better, says that a step was made
        expected = {n: 0.9 * x + 0.1 * method.get_buffer(n) for n, x in expected.items()}
    raw = {n: method.get_buffer(n).clone() for n in expected}
    average.swap()
    assert method.quantiser.started
    for name, value in expected.items():
        torch.testing.assert_close(method.get_buffer(name), value, msg=name)
    average.swap()
    assert all(torch.equal(method.get_buffer(n), x) for n, x in raw.items())

    optimizer = optim.create(method, settings)
    tensors, scalars = state.take(method, optimizer, average)
    tensors = {n: x for n, x in tensors.items() if n.removeprefix("average.") not in expected}  # a checkpoint of older code
    checkpoint.save(tmp_path, 3, tensors, scalars, facts={}, keep=1)
    state.restore(*checkpoint.load_newest(tmp_path)[1:], method, optimizer, average)
    assert all(torch.equal(average.shadow[n], x) for n, x in raw.items())


def test_scaled_images_have_the_same_loss():
    """The reconstruction's price is in units of the data's variance, so that the commitment weighs the same."""
    images, keys = stripes()
    losses = []
    for scale in (1.0, 10.0):
        method = small().eval()
        made = method.reconstruct(images)
        method.encoder.forward = None
        method.decoder.forward = lambda code, made=made, scale=scale: scale * made
        method._projected = lambda _: torch.ones(32, 16, 8)
        losses.append(method(scale * images, keys=keys).loss)
    torch.testing.assert_close(losses[0], losses[1])


def test_index_collapse_alarms():
    method, images, keys = small().eval(), *stripes()
    assert method.diagnose([(images, keys)]).figures.keys() >= {"perplexity", "codebook_usage"}
    method.quantiser.vectors[1:] = 1e3
    diagnosis = method.diagnose([(images[:16], keys[:16]), (images[16:], keys[16:])])
    assert diagnosis.figures["perplexity"] == pytest.approx(1)
    assert "index collapse" in diagnosis.alarms[0]


def test_perplexity_is_of_all_held_out_images_together():
    method, images, keys = small().train(), *stripes()
    method(images, keys=keys)
    method.eval()
    parts = [(images[i : i + 1], keys[i : i + 1]) for i in range(32)]
    assert method.diagnose(parts).figures == method.diagnose([(images, keys)]).figures


def test_the_prior_learns_what_follows_what_and_samples_it():
    net = prior.Prior(codes=5, places=6, width=32, depth=2, heads=2)
    first = torch.arange(5).repeat(20)[:, None]
    codes = (first + torch.arange(6)) % 5  # every code is followed by the next
    assert net.nats(codes).mean().detach() == pytest.approx(math.log(5), abs=1e-5)
    prior.fit(net, codes, steps=120, batch_size=32, learning_rate=3e-3, seed=0)
    nats = float(net.nats(codes).detach().mean())
    assert math.log(5) / 6 - 0.02 < nats < 0.5 * math.log(5)  # only the first code is a surprise
    drawn = net.sample(torch.arange(50))
    assert ((drawn[:, 1:] - drawn[:, :-1]) % 5 == 1).float().mean() > 0.95
    assert len(drawn[:, 0].unique()) == 5
    assert torch.equal(net.sample(torch.arange(50))[7:9], net.sample(torch.arange(7, 9)))
    changed = codes.clone()
    changed[:, 4:] = 0
    torch.testing.assert_close(net(codes)[:, :5], net(changed)[:, :5])  # the past does not see the future


def test_images_are_sampled_from_a_fitted_prior_which_is_saved_with_the_model():
    method, images, keys = small("method.prior_depth=1").train(), *stripes()
    method(images, keys=keys)
    method.eval()
    with pytest.raises(ConfigError, match="fit_prior"):
        method.sample(2)
    trainable = [n for n, p in method.named_parameters() if p.requires_grad]
    nats = method.fit_prior([(images, keys)], steps=40, batch_size=16)
    assert nats < math.log(16)
    assert [n for n, p in method.named_parameters() if p.requires_grad] == trainable
    made = method.sample(4, seed=1)
    assert made.shape == (4, 1, 8, 8)
    again = small("method.prior_depth=1").eval()
    again.load_state_dict(method.state_dict(), strict=True)
    torch.testing.assert_close(again.sample(4, seed=1), made)
    assert not torch.equal(method.sample(4, seed=2), made)


def test_a_convolutional_encoder_has_a_code_for_every_place():
    method = small("encoder.name=conv", "encoder.patch_size=4")
    images, keys = stripes(4)
    method(images, keys=keys).loss.backward()
    assert method.indices(images).shape == (4, 4)
    assert method.reconstruct(images).shape == images.shape


@pytest.mark.parametrize(
    ("words", "way_out"),
    [
        (["method.codebook_size=1"], "at least 2"),
        (["method.codebook=vqgan"], "ema, gradient, fsq"),
        (["method.commitment=-1"], "at least 0"),
        (["method.decay=1"], "below 1"),
        (["method.restart_below=1"], "below 1: the default is 0.05"),
        (["method.code_width=0"], "at least 1"),
        (["method.prior_depth=0"], "at least 1"),
        (["method.prior_width=0"], "at least 1"),
        (["method.codebook=fsq", "method.levels=[5,1]"], "at least 2"),
        (["method.codebook=fsq", "method.levels=[]"], "try"),
    ],
    ids=lambda words: words[-1] if isinstance(words, list) else "",
)
def test_bad_settings_are_refused(words, way_out):
    with pytest.raises(ConfigError, match=way_out):
        small(*words)
