"""What W&B's users expect, on real offline runs read back with W&B's own command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageColor
from torch import nn

from mae import config
from mae.data.sources import open_splits
from mae.training import histograms, lineage
from mae.training.run import RunFolder, default_folder
from mae.training.tracking import Tracker

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "configs" / "sweeps" / "learning_rate.yaml"
WANDB = """
import sys
from wandb.cli.cli import cli  # both commands in one process, which takes a second to start
cli(["sync", "--dry-run", sys.argv[1]], standalone_mode=False)
cli(["leet", "inspect", "--json", sys.argv[1]])
"""
COLOURS = ["red", "lime", "blue"]
TINY = ["encoder.embed_dim=32", "encoder.depth=1", "train.steps=4", "train.log_every=1", "evaluate.controls=false", "train.device=cpu"]


def started(folder, times):
    """The folders of so many starts of one job in one folder, each of which sends one of everything."""
    cfg = config.load(["track.wandb=offline", "track.project=digits", "track.group=together", "track.tags=[a]"])
    home = RunFolder(folder / "runs" / "x")
    home.encoder.mkdir(parents=True)
    (home.encoder / "config.json").write_text("{}")
    home.results.write_text("[]")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_SILENT", "true")
        for _ in range(times):
            tracker = Tracker(cfg, folder, "pretrain", name="x", derived={"steps": 3})
            for step, colour in enumerate(COLOURS):  # long before W&B, which takes a second to begin, looks at them
                Image.new("RGB", (8, 8), colour).save(folder / "panel.png")
                tracker.images("panel", [folder / "panel.png"], step=step)
                (folder / "page.html").write_text(colour)
                tracker.page("page", folder / "page.html")
            tracker.uses(lineage.data_set(cfg, open_splits(cfg.data)))
            tracker.log({"step": 1, "loss": 0.5})
            tracker.histograms({"gradients/blocks.0": (np.array([1, 2]), np.array([0.0, 0.5, 1.0]))}, step=2)
            tracker.table("predictions", ["image", "right"], [[np.zeros((8, 8), np.uint8), True]])
            tracker.alert("loss spike", "it leapt")
            tracker.made(lineage.encoder("x", home))
            tracker.made(lineage.results(home))
            tracker.finish()
    return sorted((folder / "wandb").glob("offline-run-*"))


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    (found,) = started(tmp_path_factory.mktemp("wandb"), 1)
    return found


@pytest.fixture(scope="module")
def records(part):
    return read_back(part)


def read_back(folder):
    """The records of an offline run by `wandb leet inspect`, after `wandb sync` has said that it would send it."""
    words = [sys.executable, "-c", WANDB, str(folder)]
    env = {name: value for name, value in os.environ.items() if name != "WANDB_SILENT"}
    shown = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "Would sync 1 run(s)" in shown.stderr
    assert folder.name in shown.stderr
    return [json.loads(line) for line in shown.stdout.splitlines()]


def of_kind(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


@pytest.mark.slow
def test_a_run_that_goes_on_is_the_same_run_and_reads_the_same_data(tmp_path):
    first, second = map(read_back, started(tmp_path, 2))
    assert of_kind(first, "run")[0]["run_id"] == of_kind(second, "run")[0]["run_id"]
    for kind in ("dataset", "model"):
        a, b = (next(x["digest"] for x in of_kind(part, "artifact") if x["type"] == kind) for part in (first, second))
        assert a == b  # to W&B that is the same version


def test_a_run_is_found_by_project_group_job_tags_and_configuration(records):
    (run,) = of_kind(records, "run")
    assert (run["project"], run["run_group"], run["job_type"], run["tags"]) == ("digits", "together", "pretrain", ["a"])
    configured = json.dumps(run["config"])
    assert all(name in configured for name in ("mask_ratio", "base_lr", "derived"))


def test_figures_have_their_own_axis(records):
    metrics = json.dumps(of_kind(records, "metric"))
    assert '"step"' in metrics
    assert "step_metric" in metrics or "step_metric_index" in metrics


def test_histograms_predictions_and_alarms_arrive(records):
    sent = json.dumps(of_kind(records, "history"))
    for word in ("gradients/blocks.0", "histogram", "predictions", "table-file"):
        assert word in sent
    assert of_kind(records, "alert")[0]["title"] == "loss spike"


def test_a_picture_and_a_page_are_those_of_their_step_though_the_next_ones_have_overwritten_the_files(part, records):
    rows = [row["item"] for row in of_kind(records, "history")]
    panels = [(row["step"], part / "files" / row["panel.filenames"][0]) for row in rows if "panel.filenames" in row]
    assert [(step, Image.open(file).getpixel((0, 0))) for step, file in panels] == [
        (step, ImageColor.getrgb(colour)) for step, colour in enumerate(COLOURS)
    ]
    assert [(part / "files" / row["page.path"]).read_text() for row in rows if "page.path" in row] == COLOURS


def test_the_lineage_holds_data_encoder_and_results_and_no_image(records):
    artifacts = {a["type"]: a for a in of_kind(records, "artifact")}
    assert {"dataset", "model", "evaluation"} <= set(artifacts)
    data = artifacts["dataset"]
    assert data["use_after_commit"] is True  # an input of the run; the others are outputs
    assert not artifacts["model"].get("use_after_commit")
    assert data["name"] == f"digits-{open_splits(config.load([]).data).train.fingerprint}"
    assert json.loads(data["metadata"])["images"]["test"] == 599
    assert [entry["path"] for entry in data["manifest"]["contents"]] == ["facts.json"]


def test_an_encoder_is_known_by_its_weights_or_else_by_its_name(tmp_path):
    home = RunFolder(tmp_path / "x")
    assert lineage.encoder("timm:vit", home).facts == {"encoder": "timm:vit"}
    home.encoder.mkdir(parents=True)
    assert lineage.encoder("x", home)[:2] == ("x-encoder", "model")
    assert lineage.encoder("x", home).path == home.encoder


def test_histograms_count_every_finite_number_of_weights_and_gradients_without_touching_them():
    module = nn.Linear(10, 20)
    before = module.weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    sent = []
    histograms.before_updates(optimizer, module, wanted=lambda: len(sent) < 1, send=sent.append)
    for _ in range(2):
        module(torch.randn(3, 10)).sum().backward()
        optimizer.step()
    (found,) = sent
    assert set(found) == {f"{kind}/{name}" for kind in ("parameters", "gradients") for name in ("weight", "bias")}
    counts, edges = found["parameters/weight"]
    assert (counts.sum(), len(edges)) == (200, len(counts) + 1)
    np.testing.assert_array_equal(counts, np.histogram(before.numpy(), edges)[0])
    assert torch.equal(module.weight, before)
    counts, edges = histograms.counted(torch.tensor([0.0, torch.inf, torch.nan, 0.0]))
    assert (counts.sum(), edges[0], edges[-1]) == (2, 0, 1)


def sweep_words(values):
    """What W&B's agent would start for these values of the parameters."""
    from wandb.sdk.launch.sweeps import utils

    given = {"args": {name: {"value": value} for name, value in values.items()}}
    variables = utils.create_sweep_command_args(given)
    words = utils.create_sweep_command(yaml.safe_load(SWEEP.read_text())["command"])
    program = {"${env}": ["/usr/bin/env"], "${interpreter}": [sys.executable], "${program}": [str(ROOT / "pretrain.py")]}
    return [part for word in words for part in (program | {"${args_no_hyphens}": variables["args_no_hyphens"]}).get(word, [word])]


def test_every_run_of_the_sweep_is_a_configuration_with_a_folder_of_its_own(monkeypatch):
    sweep = yaml.safe_load(SWEEP.read_text())
    assert (ROOT / sweep["program"]).is_file()
    first = {name: parameter["values"][0] for name, parameter in sweep["parameters"].items()}
    words = sweep_words(first)
    assert words[:3] == ["/usr/bin/env", sys.executable, str(ROOT / "pretrain.py")]
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    cfg = config.load(words[3:])
    assert (cfg.optim.base_lr, cfg.method["mask_ratio"]) == tuple(first.values())
    assert default_folder(cfg) == Path("runs/s1/r1")
    protocol, _, metric = sweep["metric"]["name"].rpartition("/")
    assert metric == "accuracy"
    assert protocol in {config.protocol(name)["name"] for name in cfg.evaluate.protocols}


@pytest.mark.slow
def test_a_run_of_the_sweep_ends_with_the_figure_that_it_seeks(tmp_path):
    env = {**os.environ, "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    words = [*sweep_words({"optim.base_lr": 0.004, "method.mask_ratio": 0.5}), *TINY, "track.histograms_every=2"]
    subprocess.run(words, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=240)
    (folder,) = (tmp_path / "runs/s1/r1/wandb").glob("offline-run-*-r1")
    shown = json.dumps(read_back(folder))
    for word in (
        "linear_probe/quick/accuracy",
        "gradients/encoder.blocks.0.attn.qkv.weight",
        "neighbours",
        "curves",
        "r1-results",
        "predictions",
    ):
        assert word in shown
