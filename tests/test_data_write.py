"""`mae shard`: the same shards whatever the workers and interruptions, nothing lost in them, nothing damaged in them."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae import config
from mae.commands import shard
from mae.data import encode, index
from mae.data.decode import decode
from mae.data.sources import open_splits
from mae.data.verify import check
from mae.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pictures(root, count=40, *, splits=("train", "val"), side=24):
    """A folder with class folders, of noise in several formats."""
    for number in range(count):
        folder = root / splits[number % 5 == 0] / f"class{number % 3}" if splits else root / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (side + number % 7, side + 4, 3), dtype=np.uint8)
        ending = ("jpg", "png", "webp", "tif")[number % 4]
        Image.fromarray(noise).save(folder / f"image.{number:03}.{ending}")
    return root


def files(folder):
    """Every file with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(*words):
    return shard.main([str(word) for word in words])


def opened(path, *words):
    return open_splits(config.load(["data.name=shards", f"data.path={path}", "data.image_size=32", *words]).data)


def members(folder):
    """Member name -> bytes, of all shards, as Python reads them."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            found |= {f"{path.name}/{m.name}": archive.extractfile(m).read() for m in archive}
    return found


def test_files_are_kept_byte_for_byte_and_what_no_shard_holds_becomes_png(tmp_path, capsys):
    source = pictures(tmp_path / "src")
    assert run(source, tmp_path / "dst", "--per-shard", 10, "--workers", 1) == 0
    assert "30 byte for byte, 10 converted to PNG" in capsys.readouterr().out
    stored = members(tmp_path / "dst")
    by_key = {name.partition("/")[2].rpartition(".")[0]: name for name in stored if not name.endswith(".cls")}
    for path in source.rglob("*.*"):
        name = by_key[f"{path.parent.name}/{path.stem.replace('.', '_')}"]
        assert name.startswith(path.parts[-3])
        assert stored[name.rpartition(".")[0] + ".cls"] == path.parent.name[-1:].encode()
        if path.suffix == ".tif":
            assert np.array_equal(decode(stored[name], channels=3, name=""), np.asarray(Image.open(path)))
        else:
            assert stored[name] == path.read_bytes()
    info = json.loads((tmp_path / "dst" / "_info.json").read_text())
    assert info["splits"]["val"]["num_samples"] == 8
    assert info["splits"]["train"]["shard_lengths"] == [10, 10, 10, 2]
    splits = opened(tmp_path / "dst")
    assert splits.train.classes == ("class0", "class1", "class2")
    assert [len(part) for part in splits] == [29, 3, 8]
    first = [name for name in stored if name.startswith("train-000000") and name.endswith(".cls")]
    assert len({stored[name] for name in first}) == 3  # every shard is a draw from all classes


@pytest.mark.slow
def test_timm_reads_what_is_written(tmp_path):
    from timm.data import create_dataset

    run(pictures(tmp_path / "src"), tmp_path / "dst", "--workers", 1)
    dataset = create_dataset("wds/", root=str(tmp_path / "dst"), split="val", is_training=False, batch_size=1)
    assert len(dataset) == 8
    assert {label for _, label in dataset} == {0, 1, 2}


def test_the_number_of_workers_and_a_stop_change_no_bit(tmp_path, monkeypatch, capsys):
    source = pictures(tmp_path / "src")
    words = ("--per-shard", 6, "--resize", 16, "--quality", 80)
    (source / "train" / "class0" / "bad.jpg").write_bytes(b"no image")
    assert run(source, tmp_path / "one", *words, "--workers", 1) == 0
    assert run(source, tmp_path / "two", *words, "--workers", 2) == 0
    assert files(tmp_path / "one") == files(tmp_path / "two")

    opens, count = encode._opened, iter(range(10**6))
    monkeypatch.setattr(encode, "_opened", lambda *a: (next(count) == 20 and os.kill(os.getpid(), signal.SIGTERM)) or opens(*a))
    assert run(source, tmp_path / "stopped", *words, "--workers", 1) == 75
    kept = {name: content for name, content in files(tmp_path / "stopped").items() if name.endswith(".tar")}
    assert 2 < len(kept) < 8
    assert kept.items() <= files(tmp_path / "one").items()
    with pytest.raises(ConfigError, match="not finished"):
        opened(tmp_path / "stopped")
    assert run(source, tmp_path / "stopped", "--per-shard", 7) == 2  # another plan
    os.truncate(tmp_path / "stopped" / min(kept), 512)  # a disk that failed meanwhile
    (tmp_path / "stopped" / ".unfinished" / f"{max(kept)}.json").write_bytes(b"")
    assert run(source, tmp_path / "stopped", *words, "--workers", 1) == 0
    assert files(tmp_path / "stopped") == files(tmp_path / "one")
    assert f"{6 * (len(kept) - 2)} of 41 images are there" in capsys.readouterr().out


@pytest.mark.slow
def test_a_kill_at_any_moment_changes_no_bit(tmp_path):
    source = pictures(tmp_path / "src", 400, side=200)
    words = [sys.executable, "-m", "mae", "shard", str(source)]
    options = ["--per-shard", "25", "--resize", "64", "--workers", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*words, str(tmp_path / "whole"), *options], env=environment, check=True)
    for shards in (1, 4, 9):
        process = subprocess.Popen([*words, str(tmp_path / "killed"), *options], env=environment, start_new_session=True)
        while process.poll() is None and len(list((tmp_path / "killed").glob("*.tar"))) < shards:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*words, str(tmp_path / "killed"), *options], env=environment, check=True)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_the_shorter_side_is_scaled_down_and_never_up(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    ramp = np.linspace(0, 255, 200, dtype=np.uint8)[None, :, None].repeat(100, 0).repeat(3, 2)
    Image.fromarray(ramp).save(source / "wide.jpg", quality=95)
    Image.fromarray(ramp[..., 0]).save(source / "grey.png")
    Image.fromarray(ramp[:20, :30]).save(source / "small.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(ramp).save(source / "turned.jpg", quality=95, exif=exif)
    assert run(source, tmp_path / "dst", "--resize", 50, "--workers", 1) == 0
    stored = {name.partition("/")[2]: content for name, content in members(tmp_path / "dst").items()}
    assert stored["small.png"] == (source / "small.png").read_bytes()
    sizes = {name: Image.open(tmp_path / "x").size for name in stored if (tmp_path / "x").write_bytes(stored[name])}
    assert sizes == {"wide.jpg": (100, 50), "grey.jpg": (100, 50), "small.png": (30, 20), "turned.jpg": (50, 100)}
    (tmp_path / "x").write_bytes(stored["grey.jpg"])
    assert Image.open(tmp_path / "x").mode == "L"
    wide = decode(stored["wide.jpg"], channels=3, name="")
    assert np.abs(wide.astype(int) - ramp[::2, ::2].astype(int)).mean() < 2


def test_damaged_images_are_left_out_and_listed_up_to_the_budget(tmp_path, capsys):
    source = pictures(tmp_path / "src", splits=())
    whole = (source / "class0" / "image.000.jpg").read_bytes()
    for name, content in (("cut.jpg", whole[: len(whole) // 2]), ("empty.png", b""), ("text.jpg", b"hello")):
        (source / "class1" / name).write_bytes(content)
    assert run(source, tmp_path / "dst", "--workers", 1) == 2
    told = capsys.readouterr().err
    assert "3 of 43 images cannot be read, more than data.damage=0.001" in told
    assert all(f"class1/{name} cannot be read" in told for name in ("cut.jpg", "empty.png", "text.jpg"))
    assert run(source, tmp_path / "dst", "--workers", 1, "data.damage=0.1") == 0
    assert len((tmp_path / "dst" / "damaged.txt").read_text().splitlines()) == 3
    assert sum(not name.endswith(".cls") for name in members(tmp_path / "dst")) == 40
    for name in ("empty.png", "text.jpg"):
        (source / "class1" / name).unlink()
    assert run(source, tmp_path / "one", "--workers", 1) == 0  # a single one is always left out


def test_any_cut_and_any_flipped_byte_of_a_shard_is_found(tmp_path):
    run(pictures(tmp_path / "src", 12, side=12), tmp_path / "dst", "--workers", 1)
    path = tmp_path / "dst" / "train-000000.tar"
    whole, published = path.read_bytes(), index.read_published(tmp_path / "dst")
    assert check(tmp_path / "dst", published, path.name).fault is None
    for cut in range(0, len(whole), 512):
        path.write_bytes(whole[:cut])
        assert "train-000000.tar" in check(tmp_path / "dst", published, path.name).fault
        with pytest.raises(ConfigError, match=r"train-000000\.tar"):
            index.make_index(tmp_path / "dst", [path.name])  # which also knows the length, so that no padding is missed
    with pytest.raises(ConfigError, match=r"train-000000\.tar"):
        opened(tmp_path / "dst")
    path.write_bytes(whole)
    heads = index.index_of_shard(path, path.name).offsets - 512
    rng = np.random.default_rng(0)
    for at in [*(int(rng.choice(heads)) + rng.integers(0, 512, 25)), *rng.integers(0, len(whole), 15)]:
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        assert check(tmp_path / "dst", published, path.name).fault is not None
        if ((heads <= at) & (at < heads + 512)).any():  # of an image's own bytes only its decoder can tell
            with pytest.raises(ConfigError, match=r"train-000000\.tar"):
                index.make_index(tmp_path / "dst", [path.name])


def test_verify_tells_every_fault_and_takes_shards_of_others(tmp_path, capsys):
    folder = tmp_path / "dst"
    run(pictures(tmp_path / "src", splits=()), folder, "--per-shard", 10, "--workers", 1)
    assert run("--verify", folder, "--workers", 1) == 0
    (folder / "train-000001.tar").write_bytes(b"short")
    (folder / "train-000003.tar").unlink()
    assert run("--verify", folder, "--workers", 1) == 2
    assert "train-000003.tar" in capsys.readouterr().err
    shutil.copy(folder / "train-000000.tar", folder / "train-000003.tar")
    assert run("--verify", folder, "--workers", 1) == 2
    told = capsys.readouterr().err
    assert "2 of 4 shards" in told
    assert "train-000001.tar" in told
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(folder / "train-000000.tar", foreign / "a.tar")
    assert run("--verify", foreign, "--workers", 1) == 0
    assert "by decoding every image" in capsys.readouterr().out
    content = bytearray((foreign / "a.tar").read_bytes())
    offset = int(index.index_of_shard(foreign / "a.tar", "a.tar").offsets[0])
    content[offset : offset + 200] = bytes(200)
    (foreign / "a.tar").write_bytes(content)
    assert run("--verify", foreign, "--workers", 1, "data.damage=0") == 2
    assert "1 of 10 images" in capsys.readouterr().err


def test_what_is_there_is_not_touched(tmp_path, monkeypatch, capsys):
    source = pictures(tmp_path / "src", splits=())
    assert run(source, tmp_path / "dst", "--workers", 1) == 0
    before = files(tmp_path / "dst")
    with monkeypatch.context() as macos:
        macos.delattr(os, "sched_getaffinity", raising=False)
        macos.setattr(os, "cpu_count", lambda: 1)
        assert run(source, tmp_path / "dst") == 0
    assert run(source, tmp_path / "dst", "--resize", 9, "--workers", 1) == 2
    assert files(tmp_path / "dst") == before
    assert run(source, source / "inside") == 2
    assert run(source, tmp_path / "src.txt", "--quality", "high") == 2
    assert run(source, tmp_path / "x", "--quality", "101") == 2
    assert run(source, tmp_path / "x", "--colour") == 2
    assert run(tmp_path / "nowhere", tmp_path / "x") == 2
    assert run(source) == 2
    told = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("mae: ") for line in told) == 7
    assert not (tmp_path / "x").exists()


def test_files_of_any_name_and_lists_that_lead_elsewhere_are_written(tmp_path, capsys):
    source, names = (
        tmp_path / "src",
        ["with space.png", "new\nline.PNG", "日本.png", "a.b.png", "{0..3}.png", os.fsdecode(b"caf\xe9.png"), "x" * 200 + ".png"],
    )
    source.mkdir()
    for number, name in enumerate(names):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(source / name, "PNG")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.txt").write_text("".join(f"../src/{name}\n" for name in names if "\n" not in name), errors="surrogateescape")
    assert run(source, tmp_path / "dst", "--workers", 1) == 0
    assert run(tmp_path / "lists" / "all.txt", tmp_path / "listed", "--workers", 1) == 0
    for folder, count in (("dst", 7), ("listed", 6)):
        stored = members(tmp_path / folder)
        assert len(stored) == count
        assert set(stored.values()) <= {(source / name).read_bytes() for name in names}
        assert sum(len(part) for part in opened(tmp_path / folder)) == count
    (source / "y.tar").write_bytes(bytes(1024))
    assert run(source, tmp_path / "both", "--workers", 1) == 2
    assert "holds .tar files and images" in capsys.readouterr().err
    assert not (tmp_path / "both").exists()


def test_an_index_whose_columns_do_not_fit_is_told(tmp_path):
    run(pictures(tmp_path / "src", 6), tmp_path / "dst", "--workers", 1)
    arrays = index.read_published(tmp_path / "dst")
    for wrong in ({"bytes": arrays["bytes"][:0]}, {"names": np.arange(len(arrays["names"]))}, {"sha256": np.array([{}], object)}):
        np.savez(tmp_path / "dst" / "_index.npz", **{**arrays, **wrong})
        with pytest.raises(ConfigError, match=r"_index\.npz is damaged"):
            index.read_published(tmp_path / "dst")


def test_other_sources_and_shards_are_written_too(tmp_path):
    assert run("configs/data/shapes.yaml", "data.length=30", "data.image_size=32", tmp_path / "shapes", "--workers", 1) == 0
    assert run(tmp_path / "shapes", tmp_path / "again", "--workers", 1) == 0
    one, other = (sorted(hashlib.sha256(content).digest() for content in members(tmp_path / d).values()) for d in ("shapes", "again"))
    assert one == other
