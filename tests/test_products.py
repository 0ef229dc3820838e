"""Linear layers by another library compute the same, and nothing else goes there."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import mae
from mae.nets import products
from mae.nets.products import wide_products
from mae.training import blocks

CPU = torch.device("cpu")


@pytest.fixture
def taken(monkeypatch):
    """Here as on a processor where it is faster, and for products of any size; a list of what has gone there."""
    seen, plain = [], products._Linear.apply
    monkeypatch.setattr(products, "_wide_here", lambda: True)
    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products._Linear, "apply", lambda *args: seen.append(args[0].shape) or plain(*args))
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        pytest.skip("this torch has only one library for products on a CPU")
    return seen


def numbers(shape, layout):
    """Random ones in memory as they come; transposed; every second one; the first row again and again."""
    *some, last = shape
    if layout == "transposed":
        return torch.randn(*some[:-1], last, some[-1]).transpose(-1, -2)
    if layout == "spread":
        return torch.randn(*some, 2 * last)[..., ::2]
    return torch.randn(1, last).expand(shape) if layout == "repeated" else torch.randn(shape)


def derivatives(x, weight, bias):
    """The layer's values, its gradients, and the gradients of their size."""
    given = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    values = F.linear(*given)
    first = torch.autograd.grad(values.sin().sum(), given, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
    return [values, *first, *second]


LAYOUTS = st.sampled_from(["plain", "transposed", "spread", "repeated"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 5), max_size=2), *[st.integers(1, 40)] * 3, LAYOUTS, LAYOUTS, st.booleans(), st.booleans())
def test_values_gradients_and_their_gradients_are_torchs(taken, batch, rows, inputs, outputs, of_x, of_weight, biased, many):
    x, weight = numbers((*batch, rows, inputs), of_x), numbers((outputs, inputs), of_weight)
    bias = torch.randn(outputs) if biased else None
    expected = derivatives(*(t if t is None else t.double() for t in (x, weight, bias)))
    taken.clear()
    with pytest.MonkeyPatch.context() as patch, wide_products(CPU):
        patch.setattr(products, "MANY_ROWS", 0 if many else 1024)  # both ways of a weight's gradient
        found = derivatives(x, weight, bias)
    assert taken[0] == x.shape
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-4 * float(other.detach().abs().max()) + 1e-6)


@pytest.mark.parametrize("words", [["mae"], ["crossmae"], ["vq_vae"], ["contractive", "method.penalty=hutchinson"]], ids=lambda w: w[0])
def test_a_step_is_the_same(taken, words):
    name, *more = words
    images, keys = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(6)

    def step(*, wide, again=False):
        method = mae.create([f"configs/methods/{name}.yaml", *more]).train()
        if again:
            blocks.recompute(method, True)
        with wide_products(CPU) if wide else nullcontext():
            loss = method(images, keys=keys).loss
        loss.backward()
        return loss.detach(), {n: p.grad for n, p in method.named_parameters() if p.grad is not None}

    expected, expected_gradients = step(wide=False)
    assert not taken
    found = []
    for again in (False, True) if name != "contractive" else (False,):
        found.append(step(wide=True, again=again))
        assert len(taken) > 20
        taken.clear()
    for loss, gradients in found:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-3, atol=1e-5)
    first, last = found[0][1], found[-1][1]
    assert all(torch.equal(first[n], last[n]) for n in first)  # repeated blocks go the same way


def test_two_threads_have_the_bits_of_one(taken):
    x, weight = torch.randn(1500, 96), torch.randn(192, 96)

    def passes(_):
        own = weight.clone().requires_grad_()
        with wide_products(CPU):
            values = F.linear(x, own)
        values.square().sum().backward()
        return values.detach(), own.grad

    alone = passes(0)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(passes, range(20)):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert len(taken) == 2 * 21


def test_repeated_blocks_compile_inside(taken):
    method = mae.create(["encoder.depth=2"]).train()
    blocks.recompute(method, True)
    images, keys = torch.rand(4, 1, 8, 8), torch.arange(4)
    expected = method(images, keys=keys).loss
    method.compile(backend="aot_eager")
    with wide_products(CPU):
        loss = method(images, keys=keys).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert not taken


@pytest.mark.filterwarnings("ignore:TF32")
def test_nothing_else_goes_there(taken, monkeypatch):
    class Own(torch.Tensor):
        pass

    x, weight = torch.randn(8, 16), torch.randn(4, 16)
    compiled = torch.compile(nn.Linear(16, 4), backend="aot_eager", fullgraph=True)
    with wide_products(CPU):
        F.linear(x.double(), weight.double())
        F.linear(x.bfloat16(), weight.bfloat16())
        F.linear(x.as_subclass(Own), weight)
        F.linear(x[0], weight)  # a single row
        F.linear(x.to("meta"), weight.to("meta"))
        x @ weight.t()
        compiled(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(x, weight).dtype == torch.bfloat16
    with wide_products(torch.device("cuda")), torch.backends.mkldnn.flags(enabled=False):
        F.linear(x, weight)
        with wide_products(CPU):
            F.linear(x, weight)
    assert not taken
    with wide_products(CPU):
        F.linear(x[:0], weight)
        assert F.linear(x, weight).shape == (8, 4)
        monkeypatch.setattr(products, "LEAST", 8 * 16 * 4 + 1)
        F.linear(x, weight)
    assert taken == [(0, 16), (8, 16)]


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "wide"),
    [
        ("AuthenticAMD", 26, "avx2 avx512f avx512_bf16", True),  # Zen 5
        ("AuthenticAMD", 25, "avx2 avx512f avx512_bf16", False),  # Zen 4: units of 256 bits
        ("AuthenticAMD", 26, "avx2", False),  # hidden by the machine's host
        ("GenuineIntel", 6, "avx2 avx512f amx_bf16", False),  # MKL's own
        ("AuthenticAMD", 130, "avx2 avx512f x", True),
    ],
)
def test_processors(vendor, family, flags, wide):
    told = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: 2\nflags\t\t: fpu {flags} end\n"
    assert products.is_wide_amd(told) == wide
    assert not products.is_wide_amd("Processor: ARMv8\n")
