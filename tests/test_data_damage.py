"""Damage has a budget that is the same for all ranks and restarts; hostile members of a shard are not opened; what stalls is named."""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae import config
from mae.commands import pretrain
from mae.data import processes, substitute
from mae.data.folder import Folder
from mae.data.loader import train_batches
from mae.data.order import global_batch
from mae.data.sources import open_splits
from mae.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(value=0, size=(40, 40)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


@settings(max_examples=40, deadline=None)
@given(length=st.integers(5, 300), bad=st.integers(0, 30), size=st.integers(8, 64), budget=st.sampled_from([0.0, 0.001, 0.02, 0.1]))
def test_the_budget_is_kept_exactly_when_the_damaged_images_are_within_it(length, bad, size, budget):
    damaged = np.arange(length) < min(bad, length)
    steps = -(-2 * length // size)
    replaced, stopped = 0, False
    for step in range(steps):
        replaced += int(damaged[global_batch(step, batch_size=size, length=length, seed=0)[1]].sum())
        try:
            substitute.check(replaced, (step + 1) * size, length, budget)
        except ConfigError:
            stopped = True
            break
        if (step + 1) * size == length:
            assert substitute.within(int(damaged.sum()), length, budget)
    if substitute.within(int(damaged.sum()), length, budget):
        assert not stopped
    elif 2 * length % size == 0:
        assert stopped


@pytest.mark.slow
def test_a_run_is_stopped_by_too_much_damage_and_goes_on_with_a_larger_budget(tmp_path, capfd, caplog):
    for i in range(60):
        (tmp_path / "images" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / f"c{i % 2}" / f"{i}.png").write_bytes(png(i))
    damage = {"cut.png": png()[:60], "empty.jpg": b"", "text.jpeg": b"no image", "more.png": b"\x89PNG\r\n\x1a\n"}
    for name, content in damage.items():
        (tmp_path / "images" / "c0" / name).write_bytes(content)
    encoder = [f"encoder.{w}" for w in ("name=vit_tiny_patch16_224", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=2")]
    decoder = [f"method.decoder_{w}" for w in ("depth=1", "width=32", "heads=2")]
    words = ["configs/data/folder.yaml", f"data.path={tmp_path / 'images'}", "data.image_size=32", "data.workers=0", *encoder, *decoder]
    words += ["train.batch_size=10", "train.steps=10", "train.log_every=2", "evaluate.protocols=[]", f"run.dir={tmp_path / 'run'}"]
    assert pretrain.main(words) == 2
    told = capfd.readouterr().err
    assert "more than data.damage=0.001" in told
    assert sum(f"c0/{name} cannot be read" in caplog.text for name in damage) >= 2
    assert pretrain.main([*words, "data.damage=0.2"]) == 0


@pytest.mark.slow
def test_a_folder_that_grew_is_answered_when_its_run_goes_on(tmp_path, monkeypatch, capfd):
    for i in range(40):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    encoder = [f"encoder.{w}" for w in ("name=vit_tiny_patch16_224", "patch_size=8", "embed_dim=32", "depth=1", "num_heads=2")]
    decoder = [f"method.decoder_{w}" for w in ("depth=1", "width=32", "heads=2")]
    images = ["configs/data/folder.yaml", f"data.path={tmp_path / 'images'}", "data.image_size=32", "data.workers=0", *encoder, *decoder]
    images += ["train.batch_size=10", "train.steps=10", "train.checkpoint_every=2", "evaluate.protocols=[]", f"run.dir={tmp_path / 'run'}"]
    opens, count = Folder.content, iter(range(10**6))
    with monkeypatch.context() as stopping:
        stopping.setattr(Folder, "content", lambda *a: (next(count) == 40 and os.kill(os.getpid(), signal.SIGTERM)) or opens(*a))
        assert pretrain.main(images) == 75
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "checkpoints").rglob("*")}
    (tmp_path / "images" / "more.png").write_bytes(png(1))
    assert pretrain.main(images) == 2
    assert "bring them back or choose another run.dir" in capfd.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "checkpoints").rglob("*")} == before
    (tmp_path / "images" / "more.png").unlink()
    assert pretrain.main(images) == 0


def test_pickles_and_libraries_in_a_shard_are_passed_over(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    hostile = pickle.dumps(Trap())
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for i in range(6):
            for ending, content in (
                ("png", png(i)),
                ("pkl", hostile),
                ("pickle", hostile),
                ("pth", hostile),
                ("pyd", b"MZ"),
                ("npy", hostile),
            ):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    c = config.load(["data.name=shards", f"data.path={tmp_path}", "data.image_size=32", "data.workers=0", "train.batch_size=4"])
    splits = open_splits(c.data)
    assert sum(len(part) for part in splits) == 6
    next(train_batches(splits.train, c, first_step=0, device=CPU))
    assert sorted(os.listdir(tmp_path)) == ["0.tar"]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_no_rank_gets_less_than_another_whatever_the_shards(tmp_path, world):
    for shard, count in enumerate((1, 7, 0, 5)):
        with tarfile.open(tmp_path / f"x-{shard}.tar", "w") as archive:
            for i in range(count):
                member = tarfile.TarInfo(f"{shard}{i}.png")
                member.size = len(png(i))
                archive.addfile(member, io.BytesIO(png(i)))
    c = config.load(["data.name=shards", f"data.path={tmp_path}", "data.image_size=32", "data.workers=0", "train.batch_size=6"])
    train = open_splits(c.data).train
    ranks = [list(islice(train_batches(train, c, first_step=0, device=CPU, rank=r, world=world), 5)) for r in range(world)]
    assert {len(batch.images) for rank in ranks for step in rank for batch in step} == {6 // world}


def folder_of_images(path, count=24):
    path.mkdir()
    for i in range(count):
        (path / f"{i}.png").write_bytes(png(i))
    words = ["data.name=folder", f"data.path={path}", "data.image_size=256", "data.workers=1", "train.batch_size=4"]
    return config.load(words)


@pytest.mark.slow
def test_a_read_that_stalls_is_named(tmp_path, monkeypatch, caplog):
    c = folder_of_images(tmp_path / "images")
    train = open_splits(c.data).train
    (tmp_path / "images" / "7.png").unlink()
    os.mkfifo(tmp_path / "images" / "7.png")  # nobody ever writes to it
    monkeypatch.setattr(processes, "STALLED_SECONDS", 15)  # given up when it is first named
    with pytest.raises(RuntimeError, match=r"reading process 0 is at 7\.png for (19|2\d) s.*does not answer"):  # within 30 seconds
        list(islice(train_batches(train, c, first_step=0, device=CPU), 30))
    assert any("7.png" in record.message and "is slow" in record.message for record in caplog.records)


FULL = """
import sys, torch
from itertools import islice
from mae import config
from mae.data import loader
from mae.data.sources import open_splits
if __name__ == "__main__":
    c = config.load(["data.name=folder", "data.path=" + sys.argv[1], "data.image_size=256", "data.workers=1", "train.batch_size=64"])
    try:
        list(islice(loader.train_batches(open_splits(c.data).train, c, first_step=0, device=torch.device("cpu")), 3))
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs namespaces")
def test_a_full_shared_memory_is_named(tmp_path):
    folder_of_images(tmp_path / "images")
    (tmp_path / "main.py").write_text(FULL)
    inside = f"mount -t tmpfs -o size=9m tmpfs /dev/shm && exec {sys.executable} {tmp_path / 'main.py'} {tmp_path / 'images'}"
    words = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", inside]
    if subprocess.run([*words[:4], "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "/dev/shm, through which batches come, has" in done.stdout


def memory(pid):
    """Resident bytes that are a process's own, without mapped files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_over_epochs_of_shards(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(8):
        with tarfile.open(tmp_path / f"x-{shard}.tar", "w") as archive:
            for i in range(100):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (128, 160, 3), dtype=np.uint8)).save(buffer, "JPEG")
                member = tarfile.TarInfo(f"{shard}-{i}.jpg")
                member.size = buffer.tell()
                archive.addfile(member, io.BytesIO(buffer.getvalue()))
    c = config.load(["data.name=shards", f"data.path={tmp_path}", "data.image_size=64", "data.workers=2", "train.batch_size=32"])
    train = open_splits(c.data).train
    batches, used = train_batches(train, c, first_step=0, device=CPU), []
    for step in range(40 * len(train) // 32):
        next(batches)
        if step % (len(train) // 32) == len(train) // 64:  # once an epoch
            workers = [worker.pid for iterator in processes._open_iterators for worker in iterator._workers]
            used.append([memory(pid) for pid in (os.getpid(), *workers)])
    batches.close()
    growth = np.array(used[-1]) - np.array(used[1])
    print("resident MiB by epoch, of the main process and the workers:", [[size >> 20 for size in sizes] for sizes in used])
    assert (growth < 32 << 20).all()  # 17 MiB were seen, of the allocator's; crops that nobody frees would be 170
