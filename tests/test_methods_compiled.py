"""Every method under torch.compile computes what it computes without."""

import copy

import pytest
import torch
from ranks import on_ranks, trained
from test_methods import LEARNING, words

import mae
from mae.training import blocks


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNING)
def test_a_compiled_step_is_one_graph_and_trains_alike(name):
    torch.compiler.reset()
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    keys, losses = torch.arange(16), []
    for compiled in (False, True):
        method = mae.create(words(name)).train()
        trained(method, images, keys, 0, 1, 2, 1e-4)  # the start of a codebook is no part of the graph
        step = torch.compile(method, backend="aot_eager", fullgraph=True) if compiled else method
        losses.append(trained(step, images, keys, 0, 1, 3, 1e-4)[0])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *([name] for name in LEARNING),
        # whose forward pass writes what it has read
        ["vae", "method.capacity=5"],
        ["vq_vae", "method.codebook=gradient"],
        ["sparse", "method.dead_after=1"],
        ["denoising", "method.corruption=patch_pca"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("by_block", [False, True], ids=["whole", "by block"])
def test_photographs_compile_to_the_same_loss_and_gradients(words, by_block):
    torch.compiler.reset()
    small = ["configs/data/cifar10.yaml", "encoder.depth=1", "method.decoder_depth=1"]
    plain = mae.create([*small, f"configs/methods/{words[0]}.yaml", *words[1:]]).train()
    compiled = copy.deepcopy(plain)
    blocks.compile_parts(compiled, by_block=by_block)
    images = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        losses = [method(images[step], keys=torch.arange(4) + step).loss for method in (plain, compiled)]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
        for loss, method in zip(losses, (plain, compiled), strict=True):
            method.zero_grad()
            loss.backward()
        found = zip(plain.named_parameters(), compiled.parameters(), strict=True)
        pairs = [(n, a.grad, b.grad) for (n, a), b in found if a.grad is not None]
        largest = max(a.abs().max() for _, a, _ in pairs)  # some gradients are rounding alone: of a norm before standardised tokens
        assert not [n for n, a, b in pairs if (a - b).abs().max() > 1e-3 * a.abs().max() + 1e-6 * largest], f"step {step}"


def losses_compiled(rank, world):
    generator = torch.Generator().manual_seed(0)
    images, found = torch.randn(32, 1, 8, 8, generator=generator), {}
    for name in ("vae", "sparse", "vq_vae"):  # those that look at the global batch
        method = mae.create(words(name)).train()
        if world > 1:
            method.compile(backend="aot_eager")
        found[name] = trained(method, images, torch.arange(32), rank, world, 3, 1e-4)[0]
    return found


@pytest.mark.slow
def test_two_compiled_ranks_lose_what_one_does(tmp_path):
    first, second = on_ranks(losses_compiled, tmp_path, 2)
    for name, losses in losses_compiled(0, 1).items():
        torch.testing.assert_close((first[name] + second[name]) / 2, losses, rtol=1e-4, atol=1e-5, msg=name)
