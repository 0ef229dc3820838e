"""Shards behind a flaky server are the bytes of the local disk, or one sentence; what a URL holds in secret stays out of everything."""

import json
import random
import re
import socket
import subprocess
import sys
import time

import pytest
from flaky_server import serving
from test_data_shards import opened, values, write

from mae import config
from mae.data import download as download_module
from mae.data.sources import open_splits
from mae.errors import ConfigError
from mae.keys import Data
from mae.training.run import RunFolder


@pytest.fixture
def server(tmp_path, monkeypatch):
    yield from serving(tmp_path, monkeypatch)


def shards(server, *, train=3, test=1, folder=""):
    (server.root / folder).mkdir(exist_ok=True, parents=True)
    for split, count, start in (("train", train, 0), ("test", test, 1000)):
        for number in range(count):
            write(server.root / folder / f"{split}-{number:03}.tar", range(start + 5 * number, start + 5 * number + 5))
    return server.root / folder


FAULTS = ["503", "429", "reset", "drop", "mute", "long", "short", "stall", "other"]


def test_a_flaky_server_gives_the_bytes_of_the_local_disk(server, tmp_path):
    here = shards(server, train=6)
    local = opened(here)
    rng = random.Random(1)
    for file in here.iterdir():
        server.faults[f"/{file.name}"] = [rng.choice(FAULTS) for _ in range(5)]
    server.faults["/train-000.tar"] = FAULTS[:5]
    server.faults["/train-001.tar"] = FAULTS[5:]
    far = opened(f"{server.url}/{{train-{{000..005}},test-000}}.tar")
    assert [part.fingerprint for part in far] == [part.fingerprint for part in local]
    assert [values(part) for part in far] == [values(part) for part in local]
    for name in (file.name for file in here.iterdir()):
        assert (far.train.source.root / name).read_bytes() == (here / name).read_bytes()
    assert not [*far.train.source.root.glob("*.part*")]
    asked = len(server.asked)
    server.shutdown(), server.server_close()
    assert opened(f"{server.url}/{{train-{{000..005}},test-000}}.tar").train.fingerprint == local.train.fingerprint  # offline by now
    assert len(server.asked) == asked


def test_troubles_that_stay_are_capped_and_named(server, tmp_path):
    here = shards(server)
    server.faults["/train-001.tar"] = ["503"] * 100
    with pytest.raises(ConfigError, match=r"train-001\.tar does not come.*503"):
        opened(f"{server.url}/train-{{000..002}}.tar")
    assert len([path for path, _ in server.asked if path == "/train-001.tar"]) == download_module.TRIES
    server.faults.clear()
    (here / "train-009.tar").write_bytes((here / "train-002.tar").read_bytes()[:1500])  # damaged where it comes from
    with pytest.raises(ConfigError, match=r"train-009\.tar does not come.*damaged.*cut short"):
        opened(f"{server.url}/train-009.tar")
    with pytest.raises(ConfigError, match=r"2 of 4 shards did not come: .*train-003\.tar.*404.*train-004\.tar.*404"):
        opened(f"{server.url}/train-{{000,001,003,004}}.tar")


def test_a_server_that_is_not_there_is_answered_soon(tmp_path, server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    start = time.monotonic()
    with pytest.raises(ConfigError, match="Connection refused"):
        opened(f"{url}/train-{{0000..0999}}.tar")
    assert time.monotonic() - start < 3


def test_lists_say_which_shards(server):
    here = shards(server, folder="set")
    local = opened(here).train.fingerprint
    names = {split: sorted(file.name for file in here.glob(f"{split}*")) for split in ("train", "test")}
    (here / "all.txt").write_text("\n".join(names["train"] + names["test"]) + "\n")
    assert opened(f"{server.url}/set/all.txt").train.fingerprint == local
    splits = {split: {"num_samples": 5 * len(n), "filenames": n, "shard_lengths": [5] * len(n)} for split, n in names.items()}
    (here / "_info.json").write_text(json.dumps({"splits": splits}))
    assert opened(f"{server.url}/set/_info.json").train.fingerprint == local


def test_a_list_that_is_none_is_answered(server):
    for content in (b"[" * 100_000, b"\xff\xfe", b'{"splits": 3}'):
        (server.root / "_info.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"_info\.json"):
            opened(f"{server.url}/_info.json")


def test_timms_info_is_believed_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(3):
        write(tmp_path / f"{number}.tar", range(10 * number, 10 * number + 10))

    def info(**splits):
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))

    info(train={"filenames": ["1.tar", "2.tar"], "shard_lengths": [10, 10]}, validation={"filenames": ["0.tar"], "shard_lengths": [10]})
    splits = opened(tmp_path)
    assert values(splits.test) == [*range(10)]
    assert sorted(values(splits.train) + values(splits.validation)) == [*range(10, 30)]
    info(train={"filenames": ["0.tar", "1.tar", "2.tar"], "shard_lengths": [10, 9, 10]})
    with pytest.raises(ConfigError, match=r"1\.tar holds 10 images but _info\.json says 9"):
        opened(tmp_path)
    (tmp_path / "_info.json").write_text('{"splits": ')
    with pytest.raises(ConfigError, match=r"_info\.json cannot be read"):
        opened(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        '{"splits": {"train": {"filenames": [["0.tar"]]}}}',
        '{"splits": {"train": {"filenames": ["0.tar"], "shard_lengths": 5}}}',
        '{"splits": {"train": {"filenames": ["0.tar"], "shard_lengths": ["5"]}}}',
        '{"splits": {"train": null}}',
        '{"splits": [1]}',
        '{"class_names": 3}',
        '{"class_names": "abc"}',
        "[" * 100_000,
        "[]",
    ],
)
def test_an_info_that_is_not_timms_is_told(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path / "0.tar", range(5))
    (tmp_path / "_info.json").write_text(content)
    with pytest.raises(ConfigError, match=r"_info\.json (cannot be read|is not timm's|has class_names).* remove it"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pipe:cat /etc/passwd", "cannot be read.*no pipe"),
        ("pipe:curl http://x/{0..9}.tar", "no pipe"),
        ("s3://bucket/{0..9}.tar", "cannot be read"),
        ("ftp://host/0.tar", "cannot be read"),
        ("file:///etc/0.tar", "cannot be read"),
        ("http:///0.tar", "cannot be read"),
        ("http://127.0.0.1:9/{0..99999999}.tar", "more than"),
        ("http://127.0.0.1:9/{0..9.tar", "braces"),
        ("http://127.0.0.1:9/a.zip", "does not end in .tar"),
        ("http://127.0.0.1:9/x/../../{0..3}.tar", "lead out"),
    ],
)
def test_other_urls_are_refused_before_anything_is_asked(path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        open_splits(Data(name="shards", path=path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"only data\.name=shards"):
        open_splits(Data(name="folder", path=path))


@pytest.mark.parametrize("name", ["../../x.tar", "/etc/x.tar", "http://127.0.0.1:9/x.tar", "a//x.tar", "x.zip"])
def test_a_list_that_leads_out_is_refused(server, tmp_path, name):
    (server.root / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [name]}}}))
    with pytest.raises(ConfigError, match=r"lead out|lists no shards"):
        opened(f"{server.url}/_info.json")
    assert {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {"_info.json"}


def test_secrets_of_a_url_are_sent_and_never_shown(server, tmp_path, caplog):
    caplog.set_level("DEBUG")
    shards(server)
    host = server.url.removeprefix("http://")
    path = f"http://me:pa%73sword@{host}/{{train-{{000..002}},test-000}}.tar?sig=tokentoken"
    opened(path)
    assert all("sig=tokentoken" in asked and headers["Authorization"] == "Basic bWU6cGFzc3dvcmQ=" for asked, headers in server.asked)
    settings = config.load(["data.name=shards", f"data.path={path}", f"run.dir={tmp_path / 'run'}"])
    RunFolder(tmp_path / "run").create(settings, {})
    other = config.load(["data.name=shards", f"data.path={path.replace('tokentoken', 'renewed')}", f"run.dir={tmp_path / 'run'}"])
    RunFolder(tmp_path / "run").check(other)  # a new signature is no other configuration
    shown = (tmp_path / "run" / "config.yaml").read_text() + caplog.text + "".join(str(f) for f in (tmp_path / "cache").rglob("*"))
    for wrong in (path.replace("002", "009"), path.replace("test-000", "gone"), path.replace(".tar", ".zip"), path.replace("http:", "s3:")):
        with pytest.raises(ConfigError) as caught:
            opened(wrong)
        shown += str(caught.value)
    assert host in shown
    assert not re.search("tokentoken|pa%73sword|password|bWU6", shown)


@pytest.mark.slow
def test_a_whole_run_keeps_the_secrets_of_its_url_to_itself(server, tmp_path):
    shards(server, train=8)
    url = server.url.replace("http://", "http://me:passpass@") + "/{train-{000..007},test-000}.tar?sig=tokentoken"
    tiny = ["data.image_size=8", "encoder.patch_size=2", "encoder.embed_dim=32", "encoder.depth=1", "encoder.num_heads=2"]
    tiny += [
        "method.decoder_width=32",
        "method.decoder_depth=1",
        "method.decoder_heads=2",
        "train.steps=2",
        "train.batch_size=8",
        "data.workers=0",
    ]
    words = [
        "configs/data/shards.yaml",
        f"data.path={url}",
        *tiny,
        "evaluate.protocols=[]",
        "track.wandb=offline",
        f"run.dir={tmp_path / 'run'}",
    ]
    done = subprocess.run([sys.executable, "pretrain.py", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    written = [file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()]
    written += [file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert any(server.url.removeprefix("http://").encode() in content for content in written)
    assert not any(
        secret in content for content in [*written, (done.stdout + done.stderr).encode()] for secret in (b"tokentoken", b"passpass")
    )
