"""The Jacobian's norm is the one that jacrev finds, however it is estimated; a code that cheats the penalty is told."""

import pytest
import torch

import mae
from mae.errors import ConfigError
from mae.methods.contractive import PENALTIES, finite_difference, hutchinson, sigmoid_layer

SMALL = ["configs/methods/contractive.yaml", "data.image_size=8", "data.channels=1", "data.mean=[0]", "data.std=[1]"]
SMALL += ["encoder.patch_size=4", "encoder.embed_dim=32", "encoder.depth=1", "encoder.num_heads=2"]
DENSE = ["encoder.name=dense", "encoder.embed_dim=24"]


def small(*words):
    torch.manual_seed(0)
    return mae.create([*SMALL, "method.bottleneck_size=8" if "encoder.name=dense" not in words else "method.weight=0.1", *words])


def inputs(count=16):
    images = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return images.cumsum(2).cumsum(3) / 4, torch.arange(count)


def exact(method, image):
    """|J|_F^2 of the code of one image (1, C, H, W)."""
    for child in method.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = False  # jacrev maps over explicit attention
    return torch.func.jacrev(method.latent)(image).square().sum()


@pytest.mark.parametrize("words", [[], ["method.bottleneck=token"], ["encoder.name=conv"]], ids=" ".join)
@pytest.mark.parametrize("name", ["finite_difference", "hutchinson"])
def test_estimates_are_jacrevs_norm_within_their_statistical_error(words, name):
    method = small(*words).double()
    image, keys = inputs(1)[0].double(), torch.arange(600)
    many = image.expand(600, -1, -1, -1)
    with torch.no_grad():
        _, first = (
            finite_difference(method.latent, many, keys, step=1e-3, probes=1)
            if name == "finite_difference"
            else hutchinson(method.latent, many, keys, probes=1)
        )
    error = first.std() / 600**0.5
    assert error > 0
    assert abs(first.mean() - exact(method, image)) < 5 * error


@pytest.mark.parametrize("penalty", PENALTIES[:2])
def test_more_probes_are_a_mean_of_independent_ones(penalty):
    method, (images, keys) = small(*DENSE, f"method.penalty={penalty}", "method.probes=64"), inputs()
    _, many = method._contraction(images, keys)
    method.probes = 1
    _, one = method._contraction(images, keys)
    _, truth = sigmoid_layer(method.latent(images), method.encoder.patch_embed.proj.weight)
    spread = ((one - truth) / truth).square().mean().sqrt()
    assert ((many - truth) / truth).square().mean().sqrt() < spread / 4


def test_closed_form_is_exact_and_so_is_the_gradient_that_the_others_estimate():
    method = small(*DENSE, "method.penalty=closed_form").double()
    images, keys = inputs(4)[0].double(), torch.arange(4)
    code, squared = method._contraction(images, keys)
    assert torch.equal(code, method.latent(images))
    assert code.shape == (4, 24)
    truth = torch.stack([exact(method, image[None]) for image in images])
    torch.testing.assert_close(squared, truth, rtol=1e-12, atol=1e-12)
    weight = method.encoder.patch_embed.proj.weight
    (expected,) = torch.autograd.grad(squared.mean(), weight)
    for estimate in (
        finite_difference(method.latent, images, keys, step=1e-3, probes=2000),
        hutchinson(method.latent, images, keys, probes=500),
    ):
        (gradient,) = torch.autograd.grad(estimate[1].mean(), weight)
        assert (gradient - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("words", [[], ["method.penalty=hutchinson"], [*DENSE, "method.penalty=closed_form"]], ids=" ".join)
def test_the_loss_is_reconstruction_plus_weighted_penalty_and_duplicating_the_batch_changes_nothing(words):
    method, (images, keys) = small(*words, "method.weight=3"), inputs()
    output = method(images, keys=keys)
    error = (method.reconstruct(images) - images).square().flatten(1).sum(1).mean()
    _, squared = method._contraction(images, keys)
    torch.testing.assert_close(output.loss, error + 3 * squared.mean())
    twice = method(images.repeat(2, 1, 1, 1), keys=keys.repeat(2))
    torch.testing.assert_close(twice.loss, output.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.metrics["jacobian_norm"], squared.mean().sqrt().detach())
    sizes = [x.square().flatten(1).sum(1).mean().sqrt() for x in (images, method.latent(images))]
    torch.testing.assert_close(output.metrics["jacobian_ratio"], (squared.mean().sqrt() * sizes[0] / sizes[1]).detach())
    with torch.no_grad():
        torch.testing.assert_close(method(images, keys=keys).loss, output.loss.detach())


@pytest.mark.parametrize("words", [[], ["method.penalty=hutchinson"]], ids=" ".join)
def test_the_penalty_is_of_full_precision_whatever_runs_around_it(words):
    method, (images, keys) = small(*words), inputs()
    plain = method(images, keys=keys).metrics["jacobian_norm"]
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", kind):
            assert torch.equal(method(images, keys=keys).metrics["jacobian_norm"], plain)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["method.penalty=hutchinson"],  # through timm's fused attention
        ["method.bottleneck=token", "encoder.reg_tokens=2", "method.probes=2"],
        ["encoder.name=conv", "method.penalty=hutchinson"],
        ["encoder.name=linear"],
        [*DENSE, "method.penalty=closed_form"],
    ],
    ids=" ".join,
)
def test_it_learns_in_bf16_and_every_parameter_does(words):
    method, (images, keys) = small(*words), inputs()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    history = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            output = method(images, keys=keys)
        optimizer.zero_grad()
        output.loss.backward()
        assert [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        history.append(float(output.loss.detach()))
    assert all(map(torch.isfinite, torch.tensor(history)))
    assert min(history[-3:]) < 0.9 * history[0]
    assert all(v.ndim == 0 and not v.requires_grad for v in output.metrics.values())
    assert method.encode(images, pool="latent").shape[0] == 16


@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_larger_weight_makes_a_more_contractive_code(penalty):
    norms = []
    for weight in (0.0, 10.0):
        method, (images, keys) = small(*DENSE, f"method.penalty={penalty}", f"method.weight={weight}"), inputs()
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
        for step in range(60):
            optimizer.zero_grad()
            method(images, keys=keys + 16 * step).loss.backward()
            optimizer.step()
        norms.append(torch.stack([exact(method, image[None]) for image in images]).mean().item())
    assert norms[1] < 0.6 * norms[0]


def test_diagnosis_tells_a_code_that_shrank_from_one_that_ignores_the_image():
    method, (images, keys) = small().eval(), inputs(64)
    batches = [(images[:40], keys[:40]), (images[40:], keys[40:])]
    healthy = method.diagnose(batches)
    assert healthy.alarms == []
    truth = torch.stack([exact(method, image[None]) for image in images]).mean().sqrt()
    assert healthy.figures["jacobian_norm"] == pytest.approx(truth.item(), rel=0.2)
    with torch.no_grad():
        squeeze, spread = method.bottleneck.squeeze, method.bottleneck.spread
        made = method.reconstruct(images)
        squeeze.weight /= 1000
        squeeze.bias /= 1000
        spread.weight *= 1000
        torch.testing.assert_close(method.reconstruct(images), made, rtol=1e-3, atol=1e-4)  # the scale alone has changed
        shrunk = method.diagnose(batches)
        assert shrunk.figures["jacobian_ratio"] == pytest.approx(healthy.figures["jacobian_ratio"], rel=0.01)
        assert len(shrunk.alarms) == 1
        assert "shrunk" in shrunk.alarms[0]
        spread.weight /= 1000
        squeeze.bias.fill_(1)
        constant = method.diagnose(batches)
    assert constant.figures["jacobian_ratio"] < 0.1
    assert any("hardly depends" in alarm for alarm in constant.alarms)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["method.penalty=exact"], "choose one of finite_difference"),
        (["method.penalty=closed_form"], r"encoder\.name=dense"),
        (["method.penalty=closed_form", "encoder.name=linear"], r"encoder\.name=dense"),
        (["method.weight=-1"], "at least 0"),
        (["method.step=0"], "above 0"),
        (["method.probes=0"], "at least 1"),
        ([*DENSE, "method.bottleneck_size=12"], "24 units are the code"),
        (["method.bottleneck_size=100"], "no bottleneck"),
    ],
)
def test_bad_settings_are_refused(words, reason):
    with pytest.raises(ConfigError, match=reason):
        small(*words)


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["method.penalty=hutchinson"]], ids=" ".join)
def test_it_trains_compiled(words):
    """Hutchinson's encoder is left out of the graph, which has no second derivative."""
    method, (images, keys) = small(*words), inputs()
    expected = method(images, keys=keys).loss
    compiled = torch.compile(method, backend="aot_eager")
    loss = compiled(images, keys=keys).loss
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)
