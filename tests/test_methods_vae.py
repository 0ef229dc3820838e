"""Properties of the variational autoencoder, of beta-VAE, and of the bound that they train."""

import math
import threading

import pytest
import torch

import mae
from mae.errors import ConfigError
from mae.methods.vae import VAE
from mae.nets import statistics
from mae.nets.gaussian import gaussian

TINY = ["encoder.embed_dim=32", "encoder.depth=1", "method.bottleneck_size=6"]
PIXELS = ["data.mean=[0]", "data.std=[1]", "method.loss=bce"]
LINEAR = ["data.image_size=4", "encoder.name=linear", "encoder.embed_dim=16", "method.bottleneck_size=8", "method.warmup_steps=0"]


def vae(*words, name="vae", base=TINY):
    return mae.create([f"configs/methods/{name}.yaml", *base, *words])


def inputs(count=8):
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(count)


def images_with_spectrum(*eigenvalues, count=512):
    """(count, 1, 4, 4) whose covariance has exactly these eigenvalues, along random axes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 16, generator=generator)
    x = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0] * count**0.5
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    return (x * torch.tensor(eigenvalues).sqrt() @ axes.T).view(count, 1, 4, 4)


def train(method, images, steps, lr):
    optimizer = torch.optim.Adam(method.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = method(images, keys=torch.arange(len(images)) + step * len(images)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(scope="module")
def linear():
    """A linear VAE of variance 1 on data with five eigenvalues above 1, and the data."""
    images = images_with_spectrum(16, 9, 6, 4, 2.5, *[0.3] * 11)
    method = vae("method.loss=gaussian", base=LINEAR)
    train(method, images, 400, 2e-2)
    return method.eval(), images


def test_a_linear_vae_uses_as_many_latents_as_eigenvalues_exceed_the_decoders_variance(linear):
    method, images = linear
    diagnosis = method.diagnose([(images, torch.arange(512))])
    assert diagnosis.figures["active_units"] == 5
    assert diagnosis.alarms == []
    # probabilistic PCA, Tipping & Bishop: the best KL is half the sum of log(eigenvalue / variance)
    assert diagnosis.figures["kl"] == pytest.approx(0.5 * sum(map(math.log, (16, 9, 6, 4, 2.5))), rel=0.05)
    assert diagnosis.figures["aggregate_covariance_distance"] < 0.2  # the codes of all images together fill the prior


def test_a_decoder_of_larger_variance_leaves_more_latents_unused():
    images = images_with_spectrum(16, 9, 6, 4, 2.5, *[0.3] * 11)
    method = vae("method.loss=gaussian", "method.variance=7", base=LINEAR)
    train(method, images, 400, 2e-2)
    assert method.diagnose([(images, torch.arange(512))]).figures["active_units"] == 2


@torch.no_grad()
def test_with_the_right_posterior_every_bound_is_the_evidence(linear):
    method, images = linear
    mean = method.decode(torch.zeros(1, 8)).flatten(1)
    axes = method.decode(torch.eye(8)).flatten(1) - mean  # (8, 16), of the decoder: x = mean + z @ axes + noise
    evidence = torch.distributions.MultivariateNormal(mean[0], axes.T @ axes + torch.eye(16)).log_prob(images.flatten(1)).mean()
    keys = torch.arange(512)
    bounds = torch.stack([method.iwae_bound(images, keys, samples=k).mean() for k in (1, 4, 32)])
    assert float((bounds - evidence).abs().max()) < 0.1
    assert float(-method(images, keys=keys).loss - evidence) == pytest.approx(0, abs=0.4)  # one draw an image
    torch.testing.assert_close(method.iwae_bound(images, keys, samples=32, chunk=5).mean(), bounds[2])


@torch.no_grad()
def test_the_importance_weighted_bound_of_a_wrong_posterior_rises_with_samples():
    method, (images, keys) = vae("method.loss=gaussian").eval(), inputs(64)
    few, some, many = (method.iwae_bound(images, keys, samples=k).mean() for k in (1, 8, 64))
    assert few + 0.5 < some
    assert some + 0.5 < many


@pytest.mark.parametrize(
    "words",
    [["method.loss=gaussian"], PIXELS, ["method.free_bits=0.5"], ["method.capacity=5"]],
    ids=["gaussian", "bce", "free_bits", "capacity"],
)
def test_the_loss_does_not_change_when_the_batch_is_doubled(words):
    images, keys = inputs()
    once = vae(*words)(images, keys=keys).loss
    twice = vae(*words)(images.repeat(2, 1, 1, 1), keys=keys.repeat(2)).loss
    torch.testing.assert_close(once, twice, rtol=1e-5, atol=1e-5)


def test_two_ranks_train_as_one_with_the_batch_of_both(monkeypatch):
    """Threads in place of processes: what a collective would exchange, they exchange."""
    words = ["method.free_bits=0.6"]
    images, keys = inputs()
    alone = vae(*words)
    alone(images, keys=keys).loss.backward()

    local, barrier, shared, losses = threading.local(), threading.Barrier(2, timeout=60), {}, {}

    def averaged(x):
        shared[local.rank] = x.detach()
        barrier.wait()
        mean = (shared[0] + shared[1]) / 2
        barrier.wait()
        return mean

    monkeypatch.setattr(statistics, "ranks", lambda: 2)
    monkeypatch.setattr(statistics, "_averaged", averaged)
    methods = [vae(*words), vae(*words)]

    def run(rank):
        local.rank = rank
        loss = methods[rank](images[4 * rank : 4 * rank + 4], keys=keys[4 * rank : 4 * rank + 4]).loss
        loss.backward()
        losses[rank] = loss.detach()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    monkeypatch.undo()
    assert losses[0] == losses[1]
    torch.testing.assert_close(losses[0], vae(*words)(images, keys=keys).loss.detach())
    for p, (a, b) in zip(alone.parameters(), zip(*(m.parameters() for m in methods), strict=True), strict=True):
        if p.requires_grad:
            torch.testing.assert_close((a.grad + b.grad) / 2, p.grad, rtol=1e-3, atol=1e-4)
    for buffer, a, b in zip(alone.buffers(), *(m.buffers() for m in methods), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, buffer)


@pytest.mark.parametrize("words", [[], ["method.loss=gaussian"], ["encoder.name=conv"]], ids=["vit", "gaussian", "conv"])
def test_at_the_defaults_the_kl_is_there_and_every_parameter_learns(words):
    method, (images, keys) = vae(*words), inputs()
    output = method(images, keys=keys)
    output.loss.backward()
    assert output.metrics["kl"] > 0.1
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    method.zero_grad()
    method._penalty(method.posterior(images).kl().mean(0)).backward()
    assert method.bottleneck.squeeze.weight.grad.abs().sum() > 0


def test_the_divergence_is_the_textbooks_and_safe_at_the_extremes():
    moments = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = gaussian(moments)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, (0.5 * q.log_variance).exp()), torch.distributions.Normal(0.0, 1.0)
    )
    torch.testing.assert_close(q.kl(), theirs)
    assert torch.isfinite(gaussian(torch.full((1, 2), 1e4).bfloat16()).kl()).all()
    assert gaussian(moments.bfloat16()).mean.dtype == torch.float32


def test_draws_from_the_prior_are_decided_by_seed_and_position():
    method = vae().eval()
    torch.testing.assert_close(method.sample(3, seed=1), method.sample(5, seed=1)[:3])  # batches of other sizes round otherwise
    assert not torch.equal(method.sample(3, seed=1), method.sample(3, seed=2))
    assert vae(*PIXELS).eval().sample(2).aminmax().max <= 1


def test_interpolation_starts_and_ends_at_the_reconstructions():
    method, (images, _) = vae().eval(), inputs()
    path = method.interpolate(images[:3], images[3:6], steps=5)
    assert path.shape == (3, 5, 1, 8, 8)
    torch.testing.assert_close(path[:, 0], method.reconstruct(images[:3]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(path[:, -1], method.reconstruct(images[3:6]), rtol=1e-4, atol=1e-5)


def test_features_are_the_posterior_mean_without_noise():
    method, (images, _) = vae().eval(), inputs()
    assert torch.equal(method.encode(images, pool="latent"), method.posterior(images).mean)


def test_a_collapsed_posterior_says_so():
    method, batches = vae().eval(), [inputs()]
    with torch.no_grad():
        method.bottleneck.squeeze.weight.zero_()
    diagnosis = method.diagnose(batches)
    assert len(diagnosis.alarms) == 1
    assert "collapse" in diagnosis.alarms[0]
    assert diagnosis.figures["kl"] == pytest.approx(0, abs=1e-6)
    wide, (images, keys) = vae("method.bottleneck_size=32").eval(), inputs()
    with torch.no_grad():
        wide.bottleneck.squeeze.weight[1:] = 0
        wide.bottleneck.squeeze.weight[0] *= 100
    assert "collapse: 1 of the 32 latents" in wide.diagnose([(images, keys)]).alarms[0]


def test_warm_up_and_capacity_follow_the_steps():
    images, keys = inputs()
    heavy, two = vae("method.beta=100", "method.warmup_steps=10"), torch.tensor([1.0, 1.0])
    curve = []
    for steps in (0, 4, 9, 1000):  # the KL counts from the first step on
        heavy.steps.fill_(steps)
        curve.append(float(heavy._penalty(two)))
    assert curve == pytest.approx([20, 100, 200, 200])
    heavy.steps.zero_()
    early = heavy(images, keys=keys).loss
    heavy.steps.fill_(1000)
    assert heavy(images, keys=keys).loss > early + 10
    held = vae("method.capacity=5", "method.capacity_steps=10", "method.capacity_weight=1")
    kl = torch.tensor([1.0, 1.0])
    assert held._penalty(kl) == 2
    held.steps.fill_(1000)
    assert held._penalty(kl) == 3


def test_free_bits_are_a_floor_of_each_dimension():
    assert vae("method.free_bits=0.5", "method.warmup_steps=0")._penalty(torch.tensor([0.1, 2.0])) == 2.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=["bf16", "fp16", "fp32"])
def test_the_loss_falls_in_every_number_format(dtype):
    method, images = vae("method.warmup_steps=0"), torch.full((8, 1, 8, 8), 0.7)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses = train(method, images, 30, 3e-3)
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 10


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["method.beta=-1"], "at least 0"),
        (["method.free_bits=-0.1"], "at least 0"),
        (["method.warmup_steps=-5"], "at least 0"),
        (["method.variance=0", "method.loss=gaussian"], "above 0"),
        (["method.capacity=5", "method.free_bits=0.1"], "one of them"),
        (["method.bottleneck_size=64", "encoder.embed_dim=96"], "choose one from 1 to 63"),
        (["method.bottleneck_size=33"], "encoder is 32 wide: choose one from 1 to 32"),
        (["method.bottleneck_size=0"], "at least 1"),
        (["method.loss=mse"], "unknown"),
        (["method.loss=bce"], r"\[0, 1\]"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_mean_nothing_are_refused(words, answer):
    with pytest.raises(ConfigError, match=answer):
        vae(*words)


def test_beta_vae_is_the_vae_with_a_heavier_kl():
    method = vae(name="beta_vae")
    assert type(method) is VAE
    assert method.beta == 4
    with pytest.raises(ConfigError, match="at least 0"):
        vae("method.beta=-4", name="beta_vae")
