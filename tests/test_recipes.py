"""The shipped recipes say what the paper says, and a sweep's runs find their folders."""

import dataclasses
from pathlib import Path

import pytest
import torch

from mae import config
from mae.methods.build import build
from mae.training import schedule
from mae.training.run import default_folder

IMAGES = 1_281_167  # of ImageNet-1k's training split


SIZES = [("base", 768, 12, 16), ("large", 1024, 24, 16), ("huge", 1280, 32, 14), ("giant", 1408, 40, 14)]


@pytest.mark.parametrize(("size", "width", "depth", "patch"), SIZES)
def test_pretraining_is_the_papers_table_8(size, width, depth, patch):
    cfg = config.load([f"configs/recipes/mae_vit_{size}_in1k.yaml", "data.path=somewhere"])
    plan = schedule.plan(cfg, IMAGES)
    assert plan.peak_lr == pytest.approx(2.4e-3)
    assert plan.warmup == pytest.approx(40 / 1600, rel=1e-3)
    assert (cfg.optim.betas, cfg.optim.weight_decay, cfg.optim.clip) == ([0.9, 0.95], 0.05, None)
    assert (cfg.data.crop_scale, cfg.data.flip, cfg.image_size) == ([0.2, 1.0], True, (224, 224))
    with torch.device("meta"):  # shapes without memory
        method = build(cfg)
    assert (method.encoder.embed_dim, len(method.encoder.blocks), method.patch) == (width, depth, (patch, patch))
    patches = (224 // patch) ** 2
    assert (method.hidden_count, method.norm_pix, len(method.decoder.blocks)) == (patches - patches // 4, True, 8)
    assert method.decoder.embed.out_features == 512
    assert method.decoder.blocks[0].attn.num_heads == 16


@pytest.mark.parametrize(
    ("variant", "rate", "decay"), [("paper", 1e-3, 0.75), ("official_repo", 5e-4, 0.65)], ids=["paper", "official_repo"]
)
def test_fine_tuning_is_table_9_or_the_repositorys(variant, rate, decay):
    cfg = config.load([f"configs/evaluation/finetune_{variant}.yaml"])
    assert (cfg.optim.base_lr, cfg.optim.layer_decay, cfg.optim.betas, cfg.optim.min_lr) == (rate, decay, [0.9, 0.999], 1e-6)
    assert (cfg.train.epochs, cfg.train.batch_size, cfg.optim.warmup_epochs) == (100, 1024, 5)
    expected = {"drop_path": 0.1, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25}
    assert {k: v for k, v in cfg.protocol.items() if k != "name"} == expected


def test_linear_probing_is_the_papers_table_10():
    cfg = config.load(["configs/evaluation/linear_probe_paper.yaml"])
    assert schedule.plan(cfg, IMAGES).peak_lr == pytest.approx(6.4)
    assert (cfg.optim.name, cfg.optim.momentum, cfg.optim.weight_decay, cfg.train.epochs, cfg.optim.warmup_epochs) == (
        "lars",
        0.9,
        0,
        90,
        10,
    )


def test_a_run_of_a_sweep_has_its_own_folder(monkeypatch):
    cfg = config.load([])
    assert default_folder(cfg) == Path("runs/digits-mae")
    assert default_folder(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=2))) == Path("runs/digits-mae-s2")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "run")
    assert default_folder(cfg) == Path("runs/sweep/run")
