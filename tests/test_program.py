"""The programs as a user runs them: real processes, real kills, real files."""

import contextlib
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

import mae
from mae import config
from mae.commands import finetune, linear_probe
from mae.data.sources import open_splits

ROOT = Path(__file__).parents[1]
THREADS = "2"  # the halves of a batch run side by side, as they do for most users
TINY = ["encoder.embed_dim=32", "encoder.depth=1", "train.precision=fp32", "train.log_every=1", "evaluate.protocols=[knn]"]
TINY += ["evaluate.controls=false", "track.wandb=off"]


def command(*words, script="pretrain.py", ranks=1):
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    program = script.split() if script.startswith("-m") else [str(ROOT / script)]
    return [*launcher, *program, *map(str, words)]


def run(*words, cwd, script="pretrain.py", ranks=1, code=0, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": THREADS, **environment}
    done = subprocess.run(command(*words, script=script, ranks=ranks), cwd=cwd, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def rows(folder):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def weights(folder):
    return load_file(folder / "encoder" / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of 60 steps, mirrored by W&B offline."""
    cwd = tmp_path_factory.mktemp("finished")
    words = [*TINY, "train.steps=60", "train.checkpoint_every=20", "run.dir=run", "track.wandb=offline", "track.images_every=30"]
    output = run(*words, "evaluate.protocols=[knn,linear_probe_quick,few_shot]", cwd=cwd)
    return cwd / "run", output


def test_a_run_leaves_what_the_design_promises(finished):
    folder, output = finished
    assert "knn" in output.stdout
    assert "WARNING: the model has not left the plateau" in output.stdout  # 60 steps teach nothing, and it says so
    assert [r["step"] for r in rows(folder)] == list(range(1, 61))
    assert {"samples", "epoch", "lr", "grad_norm", "images_per_second", "data_wait", "batch_hash"} <= set(rows(folder)[0])
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    for entry in json.loads((folder / "results.json").read_text()):
        assert {"protocol", "protocol_hash", "data", "split", "seed", "metrics", "encoder", "settings", "code", "seconds"} <= set(entry)
    assert (folder / "figures" / "reconstructions.png").stat().st_size > 1000
    page = (folder / "report.html").read_text()
    assert "The honest reading" in page
    assert "WARNING" not in page  # it stands there as a box, in its own words:
    assert "the model has not left the plateau" in page


def test_the_encoder_opens_in_timm_and_in_mae_with_the_same_features(finished):
    folder, _ = finished
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).eval()
    method = mae.load(folder)
    images = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(images), method.encode(images))
        torch.testing.assert_close(model.forward_features(images)[:, 0], method.encode(images, pool="cls"))
    assert model.pretrained_cfg["mean"] == pytest.approx(
        tuple(json.loads((folder / "encoder" / "config.json").read_text())["pretrained_cfg"]["mean"])
    )


def test_a_finished_run_shows_its_results_again_and_another_configuration_is_refused(finished):
    folder, output = finished
    words = [*TINY, "train.steps=60", "train.checkpoint_every=20", "run.dir=run", "evaluate.protocols=[knn,linear_probe_quick,few_shot]"]
    again = run(*words, cwd=folder.parent)
    assert next(line for line in output.stdout.splitlines() if line.startswith("run")) in again.stdout
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    refused = run(*words, "method.mask_ratio=0.5", cwd=folder.parent, code=2)
    assert "method.mask_ratio was 0.75 and is now 0.5" in refused.stderr
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_killed_and_resumed_equals_not_killed(finished, tmp_path):
    words = [*TINY, "train.steps=60", "train.checkpoint_every=20", "run.dir=run", "evaluate.protocols=[knn,linear_probe_quick,few_shot]"]
    process = subprocess.Popen(
        command(*words), cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": THREADS}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    wait_for_row(tmp_path / "run", 30, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(rows(tmp_path / "run")) < 60
    resumed = run(*words, cwd=tmp_path)
    assert "resuming from" in resumed.stderr
    assert_the_same_run(tmp_path / "run", finished[0])


def assert_the_same_run(mine, other):
    """Weights and rows, to the bit."""
    own, theirs = weights(mine), weights(other)
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[k], theirs[k]) for k in own)
    keep = ("step", "loss", "grad_norm", "lr", "batch_hash")
    assert [[r[k] for k in keep] for r in rows(mine)] == [[r[k] for k in keep] for r in rows(other)]


def test_ctrl_c_saves_says_how_to_go_on_and_costs_no_bit(finished, tmp_path):
    words = [*TINY, "train.steps=60", "train.checkpoint_every=20", "run.dir=run", "evaluate.protocols=[knn,linear_probe_quick,few_shot]"]
    env = {**os.environ, "OMP_NUM_THREADS": THREADS}
    process = subprocess.Popen(command(*words), cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_row(tmp_path / "run", 5, process)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75, stderr
    assert "run the same command to go on" in stderr
    assert "Traceback" not in stderr
    stopped = rows(tmp_path / "run")[-1]["step"]
    assert stopped < 60
    resumed = run(*words, cwd=tmp_path)
    assert f"step-{stopped:08d}" in resumed.stderr  # no step is taken twice
    assert_the_same_run(tmp_path / "run", finished[0])


def test_a_signal_saves_and_exits_with_75_and_two_jobs_cannot_share_a_folder(finished, tmp_path):
    words = [*TINY, "train.steps=100000", "train.checkpoint_every=50000", "run.dir=run"]
    process = subprocess.Popen(command(*words), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_row(tmp_path / "run", 5, process)
    second = run(*words, cwd=tmp_path, code=2)
    assert f"pid {process.pid}" in second.stderr
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "run the same command to go on" in stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"
    last = rows(tmp_path / "run")[-1]["step"]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{last:08d}"]


def test_two_ranks_take_the_same_steps_as_one(tmp_path):
    words = [*TINY, "train.steps=20", "run.dir=run", "evaluate.protocols=[]"]
    for name, extra, ranks in (("one", [], 1), ("two", ["train.accumulate=2"], 2)):
        (tmp_path / name).mkdir()
        told = run(*words, *extra, cwd=tmp_path / name, ranks=ranks).stderr
        assert not [line for line in told.splitlines() if "Warning" in line]
    one, two = rows(tmp_path / "one" / "run"), rows(tmp_path / "two" / "run")
    assert [r["batch_hash"] for r in two] == [r["batch_hash"] for r in one]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)
    assert [r["grad_norm"] for r in two] == pytest.approx([r["grad_norm"] for r in one], rel=1e-4)


def test_a_non_finite_loss_stops_before_the_update_and_leaves_a_good_checkpoint(tmp_path):
    words = [*TINY, "train.steps=50", "train.checkpoint_every=1", "run.dir=run", "optim.base_lr=1e30", "optim.warmup_epochs=0"]
    stopped = run(*words, cwd=tmp_path, code=1)
    assert "not finite" in stopped.stderr
    assert "optim.base_lr" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "failed"
    for value in mae.load(tmp_path / "run").state_dict().values():
        assert torch.isfinite(value).all()


def test_an_offline_wandb_run_mirrors_the_metrics_and_a_silent_server_stops_nothing(finished, tmp_path):
    folder, _ = finished
    pretrained = read_back(folder)
    for figure in ("loss", "grad_norm", "knn/accuracy", "reconstructions", "run-encoder"):
        assert figure in pretrained
    run("run", "track.wandb=offline", "evaluate.controls=false", cwd=folder.parent, script="linear_probe.py")
    probed = read_back(folder)
    for sent in ("use_after_commit", "run-encoder", "run-results", "predictions", "linear_probe/quick/accuracy"):
        assert sent in probed  # from the data and the encoder to figures
    for shown, job in ((pretrained, "pretrain"), (probed, "linear_probe")):
        record = next(json.loads(line)["run"] for line in shown.splitlines() if json.loads(line)["type"] == "run")
        assert (record["run_group"], record["job_type"]) == ("run", job)  # the group links what was done with one encoder
    key, server = "5ec2e7" * 7, socket.create_server(("127.0.0.1", 0))  # takes connections, and never says a word
    silent = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": key[:40]}
    limits = {"WANDB_INIT_TIMEOUT": "2", "WANDB_FINISH_TIMEOUT": "2"}
    with server:
        lost = run(*TINY, "train.steps=12", "run.dir=run", "track.wandb=online", cwd=tmp_path, **silent, **limits)
    assert "W&B" in lost.stderr
    assert "Traceback" not in lost.stderr
    assert len(rows(tmp_path / "run")) == 12
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "done"
    assert key[:40] not in lost.stderr
    assert not any(key[:40].encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())


def test_probe_and_fine_tuning_start_from_a_run_and_stand_beside_their_controls(finished, monkeypatch, capfd):
    folder, _ = finished
    monkeypatch.chdir(folder.parent)
    small = ["train.epochs=2", "train.batch_size=128", "optim.warmup_epochs=0", "train.log_every=1"]
    assert linear_probe.main(["run", "configs/evaluation/linear_probe_paper.yaml", *small, "track.wandb=off"]) == 0
    run("run", *small, "track.wandb=offline", cwd=folder.parent, script="finetune.py")
    for name in ("linear_probe/paper", "finetune/paper"):
        own = folder / name.replace("/", "-")
        assert (own / "metrics.jsonl").is_file()
        entries = [e for e in json.loads((folder / "results.json").read_text()) if e["protocol"] == name]
        assert [e["encoder"]["name"] for e in entries] == ["run", "control:pixels", "control:pca", "control:untrained"]
        assert len({(e["protocol_hash"], e["data"]) for e in entries}) == 1
        for entry in entries:  # compared image by image, wherever it was trained
            with np.load(folder / entry["correct"]) as right:
                assert 100 * right["accuracy"].mean() == pytest.approx(entry["metrics"]["accuracy"])
    record = next(json.loads(line)["run"] for line in read_back(own).splitlines() if json.loads(line)["type"] == "run")
    assert (record["run_group"], record["job_type"]) == ("run", "finetune")
    classifier = timm.create_model(f"local-dir:{folder / 'finetune-paper' / 'classifier'}", pretrained=True).eval()
    assert classifier.pretrained_cfg["label_names"] == [str(digit) for digit in range(10)]
    digits = open_splits(config.load([]).data).test
    pixels = torch.stack([torch.from_numpy(digits.read(i)).permute(2, 0, 1) for i in range(len(digits))]) / 255
    with torch.no_grad(), np.load(folder / entries[0]["correct"]) as right:
        found = classifier((pixels - classifier.pretrained_cfg["mean"][0]) / classifier.pretrained_cfg["std"][0]).argmax(1)
        assert np.mean((found.numpy() == digits.labels) == right["accuracy"]) > 0.99  # rounding may turn one
    kept = {p: p.stat().st_mtime_ns for p in Path(".cache/controls").rglob("results.json")}
    assert len(kept) == 6
    capfd.readouterr()
    assert finetune.main(["run", *small, "train.seed=1", "track.wandb=off"]) == 0  # another seed, the same controls
    assert "raw pixels" in capfd.readouterr().out
    assert kept == {p: p.stat().st_mtime_ns for p in Path(".cache/controls").rglob("results.json")}


@pytest.mark.slow
def test_a_closed_terminal_saves_first(tmp_path):
    words = [*TINY, "train.steps=100000", "train.checkpoint_every=50000", "run.dir=run"]
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    process = subprocess.Popen(command(*words), cwd=tmp_path, stdin=inside, stdout=inside, stderr=inside, start_new_session=True)
    os.close(inside)
    os.set_blocking(terminal, False)
    try:
        shown, deadline = b"", time.monotonic() + 60
        while b"images/s" not in shown:
            assert time.monotonic() < deadline, shown
            with contextlib.suppress(BlockingIOError):
                shown += os.read(terminal, 65536)
            time.sleep(0.05)
        os.close(terminal)  # from here on, whatever is written to it is an error
        time.sleep(2)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75
    finally:
        process.kill()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "preempted"


@pytest.mark.slow
def test_two_ranks_measure_what_one_process_does(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "run")
    words = ["run", "configs/evaluation/knn.yaml", "configs/evaluation/linear_probe_quick.yaml", "track.wandb=off"]
    figures = []
    for ranks in (1, 2):
        shutil.rmtree(tmp_path / ".cache", ignore_errors=True)
        (tmp_path / "run" / "results.json").unlink()
        run("evaluate", *words, cwd=tmp_path, script="-m mae", ranks=ranks)
        figures.append(
            {(e["protocol"], e["encoder"]["name"]): e["metrics"] for e in json.loads((tmp_path / "run" / "results.json").read_text())}
        )
    one, two = figures
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(metrics, abs=0.5) for key, metrics in one.items())  # rounding may turn a close vote
    assert all(metrics["n_test"] == 599 for metrics in two.values())


def read_back(folder):
    """The newest offline run of a folder, as W&B's own command prints it: one JSON record a line."""
    newest = max((folder / "wandb").glob("offline-run-*"), key=lambda p: p.stat().st_mtime_ns)
    shown = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(newest)], capture_output=True, text=True, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def wait_for_row(folder, step, process, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (folder / "metrics.jsonl").is_file() and len((folder / "metrics.jsonl").read_text().splitlines()) >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {seconds} s")
