"""The training step is fast, and computes what it always computed; the benchmark that says so is honest about it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mae
from mae.nets import vit

ROOT = Path(__file__).parents[1]
SMALL = ["data.image_size=32", "data.channels=3", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
SMALL += ["encoder.patch_size=4", "encoder.embed_dim=64", "encoder.depth=2", "method.decoder_depth=2"]


def plain_loss(method, images, keys):
    """The loss as the paper's text has it: every token through every block, every step of the target one by one."""
    patches = vit.patchify(images, method.patch)
    visible, hidden = method.split(keys)
    if method.predicted_count < method.hidden_count:
        hidden = method._some(hidden, keys)

    def gathered(ids):
        return patches.gather(1, ids[..., None].expand(-1, -1, patches.shape[2]))

    _, decoded = method.decoder(vit.encode_patches(method.encoder, patches, visible), visible, hidden)
    target = gathered(hidden)
    if method.norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (method.decoder.pred(decoded) - target).square().mean()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("words", [[], ["method.predict_share=0.3", "method.norm_pix=false"]], ids=["all", "a share"])
@pytest.mark.parametrize("name", ["mae", "crossmae"])
def test_loss_and_gradients_of_the_fast_and_of_the_plain_path_are_equal(name, words, fused):
    method = mae.create([*SMALL, f"configs/methods/{name}.yaml", *words])
    torch.manual_seed(1)
    for parameter in method.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    for child in method.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = fused
    images, keys = torch.rand(3, 3, 32, 32), torch.arange(3)
    images[0, :, :16] = 0.5  # flat patches, whose deviation is zero
    found = []
    for loss in (method(images, keys=keys).loss, plain_loss(method, images, keys)):
        method.zero_grad()
        loss.backward()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in method.named_parameters() if p.grad is not None}))
    (fast, gradients), (plain, expected) = found
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=lambda m, n=parameter: f"{n}: {m}")


def test_taking_tokens_is_gathering_them():
    tokens, ids = torch.randn(3, 7, 5), torch.rand(3, 7).argsort(1)[:, :4]
    assert torch.equal(vit.take(tokens, ids), tokens.gather(1, ids[..., None].expand(-1, -1, 5)))
    assert torch.equal(vit.take(tokens[:1], ids), tokens[:1].expand(3, -1, -1).gather(1, ids[..., None].expand(-1, -1, 5)))


def test_all_sides_of_the_benchmark_compute_the_same_loss_and_their_cost_is_what_torch_counts(capsys, monkeypatch):
    pytest.importorskip("transformers")
    import contest
    from peers import Size
    from sides import Here, Setting

    class InThisProcess(Here):  # the script for GPUs, below, has them in processes
        def __init__(self, program, weights, setting):
            super().__init__(program, torch.load(weights, weights_only=True), setting)

        def close(self):
            pass

    monkeypatch.setattr(contest, "Apart", InThisProcess)
    monkeypatch.setitem(contest.SECONDS, "cpu", 0.01)
    size = Size(image=16, patch=4, width=32, depth=2, heads=2, decoder_width=16, decoder_depth=2, decoder_heads=2)
    setting = Setting(size, 4, torch.device("cpu"), "fp32", ("float32", "best"), compiled=False, clock="cpu")
    figures = contest.Contest(size, setting, quick=True).run(2)
    assert "apart" in capsys.readouterr().out
    ratios = [key for key, value in figures.items() if key.endswith("ratio") and value is not None]
    assert {"float32_ratio", "best_ratio", "textbook_ratio", "cross_ratio", "memory_ratio"} <= set(ratios)

    def spoilt(*given, fused):
        model = textbook_with(*given, fused=fused)
        model.norm.weight.data.mul_(2)
        return model

    textbook_with = contest.textbook_with
    monkeypatch.setattr(contest, "textbook_with", spoilt)
    with pytest.raises(SystemExit, match="do not compute the same loss"):
        contest.prove(contest.first_weights(size), setting)


def test_the_profile_sees_the_halves_of_a_batch():
    words = ["--model", "vit_tiny", "--device", "cpu", "--precision", "fp32", "--batch", "8", "--steps", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "profile.py"), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    head, step, *_ = done.stdout.splitlines()
    assert "2 threads" in head
    assert re.fullmatch(r"[\d.]+ ms a step, [\d.]+ of all threads together", step)
    assert "aten::addmm" in done.stdout  # the forward pass, which the main thread has no part in


@pytest.mark.slow
def test_the_gpu_script_rehearses_on_a_cpu(tmp_path):
    environment = os.environ | {"TINY": "1", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    done = subprocess.run(
        ["sh", str(ROOT / "benchmarks" / "gpu.sh"), str(tmp_path), "cpu"], capture_output=True, text=True, env=environment, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert figures["benchmark"] == "train_step"
    assert figures["vit_tiny_float32_ratio"] > 0
    assert figures["vit_tiny_real_ratio"] > 0
    assert figures["vit_large_mfu"] is None
    assert "matrix products" in (tmp_path / "profile.log").read_text()
