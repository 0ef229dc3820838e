"""Schedule, parameter groups and LARS equal what the MAE paper describes, Muon equals timm's; a checkpoint gives back what it was given."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.optim.muon import zeropower_via_newtonschulz
from torch import nn

import mae
from mae import config
from mae.training import checkpoint, muon, optim, schedule, state
from mae.training.lars import LARS


@settings(max_examples=50, deadline=None)
@given(
    epochs=st.integers(2, 400),
    warmup=st.integers(0, 40),
    images=st.integers(100, 5000),
    batch=st.integers(1, 300),
    where=st.floats(0, 0.999),
)
def test_the_learning_rate_follows_the_papers_curve(epochs, warmup, images, batch, where):
    warmup = min(warmup, epochs)
    words = [
        f"train.epochs={epochs}",
        f"train.batch_size={batch}",
        f"optim.warmup_epochs={warmup}",
        "optim.base_lr=1.5e-4",
        "optim.min_lr=1e-6",
    ]
    plan = schedule.plan(config.load(words), images)
    assert plan.steps == math.ceil(epochs * images / batch)
    step = int(where * plan.steps)
    epoch = step * batch / images  # fractional, as the paper's per-iteration schedule has it
    total = plan.steps * batch / images
    peak = 1.5e-4 * batch / 256
    if epoch < warmup:
        expected = peak * epoch / warmup
    else:
        expected = 1e-6 + (peak - 1e-6) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(total - warmup, 1e-9)))
    assert plan.learning_rate(plan.done(step, 0)) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_wall_clock_budget_ends_its_schedule_on_time():
    plan = schedule.plan(config.load(["train.minutes=10"]), 1000)
    assert plan.done(10**6, 599.9) < 1 <= plan.done(0, 600)
    assert plan.learning_rate(plan.done(0, 599.99)) < 1e-5 * plan.peak_lr
    assert plan.learning_rate(plan.done(0, 30)) == pytest.approx(plan.peak_lr)


def test_only_matrices_and_tokens_are_decayed():
    method = mae.create([])
    optimizer = optim.create(method, config.load(["optim.name=adamw", "optim.weight_decay=0.05"]).optim)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for name, p in method.named_parameters():
        if p.requires_grad:
            assert decay[id(p)] == (0.05 if p.ndim > 1 else 0), name
        else:
            assert id(p) not in decay


def test_layer_decay_scales_from_the_head_down():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=5, global_pool="avg")
    optimizer = optim.create(model, config.load(["optim.layer_decay=0.5", "optim.base_lr=1"]).optim)
    optim.set_learning_rate(optimizer, 1.0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    rate = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert rate["head.weight"] == 1
    assert [rate[f"blocks.{i}.mlp.fc1.weight"] for i in (2, 1, 0)] == [0.5, 0.25, 0.125]
    assert rate["patch_embed.proj.weight"] == rate["pos_embed"] == rate["cls_token"] == 0.0625


def test_lars_takes_the_papers_step():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([weight, bias], lr=2.0, momentum=0.5)
    for step in (1, 2):
        weight.grad, bias.grad = torch.tensor([[0.0, 10.0]]), torch.tensor([0.25])
        before = weight.detach().clone(), bias.detach().clone()
        optimizer.step()
        velocity = 0.001 * before[0].norm() / 10 * 10
        if step == 1:
            torch.testing.assert_close(before[0] - weight, torch.tensor([[0.0, 2.0]]) * velocity)
            torch.testing.assert_close(before[1] - bias, torch.tensor([0.5]))
            first = velocity
    torch.testing.assert_close(before[0] - weight, torch.tensor([[0.0, 2.0]]) * (velocity + 0.5 * first))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (48, 48)])
def test_muon_moves_matrices_as_timms_and_vectors_as_adamw(shape, half, monkeypatch):
    monkeypatch.setattr(muon, "cpu_has_bf16", lambda: True)
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(7))
    theirs = [p.detach().clone().requires_grad_() for p in (weight, bias)]
    groups = [{"params": [weight], "matrix": True, "weight_decay": 0.1}, {"params": [bias], "matrix": False}]
    ours = muon.Muon(groups, lr=0.03, momentum=0.9, betas=(0.9, 0.95), half=half)
    scale = 0.2 * max(shape) ** 0.5
    momentum, reference = torch.zeros(shape), torch.optim.AdamW([theirs[1]], lr=0.03, betas=(0.9, 0.95), weight_decay=0)
    for _ in range(3):
        weight.grad, bias.grad = torch.randn(shape), torch.randn(7)
        theirs[1].grad = bias.grad.clone()
        momentum = momentum.lerp(weight.grad, 0.1)
        coefficients = [(3.4445, -4.7750, 2.0315)]
        update = zeropower_via_newtonschulz(
            weight.grad.lerp(momentum, 0.9), 5, coefficients, dtype=torch.bfloat16 if half else torch.float32
        )
        theirs[0].data.mul_(1 - 0.03 * 0.1).sub_(0.03 * scale * update)
        ours.step()
        reference.step()
    moved = 3 * 0.03 * scale * float(update.abs().max())
    torch.testing.assert_close(weight, theirs[0], rtol=1e-4, atol=0.02 * moved if half else 1e-5)
    torch.testing.assert_close(bias, theirs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("half", "hardware"), [(False, True), (True, False), (True, True)])
def test_muons_update_has_singular_values_near_one(half, hardware, monkeypatch):
    monkeypatch.setattr(muon, "cpu_has_bf16", lambda: hardware)
    torch.manual_seed(0)
    values = torch.linalg.svdvals((found := muon.orthogonalise(1e-6 * torch.randn(3, 32, 80), half=half)).float())
    assert found.dtype == (torch.bfloat16 if half and hardware else torch.float32)
    assert values.min() > 0.65
    assert values.max() < 1.25


@pytest.mark.parametrize("name", ["adamw", "muon", "lars", "sgd"])
def test_a_restored_run_goes_on_bit_for_bit(name, tmp_path):
    settings_ = config.load([f"optim.name={name}", "optim.base_lr=0.01", "encoder.depth=1"]).optim

    def fresh():
        method = mae.create(["encoder.depth=1", "encoder.embed_dim=32"])
        return method, optim.create(method, settings_), optim.Average(method, 0.9)

    def advance(method, optimizer, average, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            loss = method(torch.randn(4, 1, 8, 8, generator=generator), keys=torch.arange(4) + step).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update()

    straight = fresh()
    advance(*straight, range(6))
    stopped = fresh()
    advance(*stopped, range(3))
    tensors, scalars = state.take(*stopped)
    checkpoint.save(tmp_path, 3, tensors, scalars, facts={}, keep=2)
    resumed = fresh()
    _, tensors, scalars = checkpoint.load_newest(tmp_path)
    state.restore(tensors, scalars, *resumed)
    advance(*resumed, range(3, 6))
    for one, two in zip(straight[0].state_dict().values(), resumed[0].state_dict().values(), strict=True):
        assert torch.equal(one, two)
    for key, value in straight[2].shadow.items():
        assert torch.equal(value, resumed[2].shadow[key])
