"""Shards behind a flaky server are the bytes of the local disk, or one sentence; what a URL holds in secret stays out of everything."""

import http.server
import json
import random
import re
import socket
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
from test_data_shards import add, opened, png, values, write

from mae import config
from mae.data import download as download_module
from mae.data.download import GaveUp, download
from mae.data.sources import open_splits
from mae.errors import ConfigError
from mae.training.run import RunFolder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder with ranges, and the faults that it is told: a list a path, taken one a request."""

    daemon_threads = True

    def __init__(self, root):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.faults, self.asked, self.ranges, self.tag = root, {}, [], True, '"1"'
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the play


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        server.asked.append((self.path, dict(self.headers)))
        faults = server.faults.get(path, [])
        fault = faults.pop(0) if faults else ""
        file = server.root / path.lstrip("/")
        if fault.isdigit():
            return self.send_error(int(fault))
        if fault == "reset":
            return self.connection.close()
        if not file.is_file():
            return self.send_error(404)
        body, status = file.read_bytes(), 200
        total, start = len(body), 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and server.ranges and self.headers.get("If-Range", server.tag) == server.tag:
            start, status = int(wanted[1]), 206
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        if fault == "other":
            start = max(start - 7, 0)
        body = body[start:]
        self.send_response(status)
        self.send_header("ETag", server.tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        claimed = {"long": len(body) + 100, "short": max(len(body) - 700, 0)}.get(fault, len(body))
        if fault != "mute":  # a body that ends with the connection
            self.send_header("Content-Length", str(claimed))
        self.send_header("Connection", "close")
        self.end_headers()
        cut = random.Random(len(server.asked)).randrange(1, max(len(body), 2)) if fault in ("drop", "mute", "stall") else len(body)
        self.wfile.write(body[:cut])
        if fault == "stall":
            self.wfile.flush()
            time.sleep(2.5 * download_module.SILENCE_SECONDS)
        self.close_connection = True


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    for name, value in (("FIRST_WAIT", 0.001), ("LONGEST_WAIT", 0.01), ("SILENCE_SECONDS", 0.2)):
        monkeypatch.setattr(download_module, name, value)
    (tmp_path / "there").mkdir()
    serving = Server(tmp_path / "there")
    yield serving
    serving.shutdown()
    serving.server_close()


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


@pytest.mark.parametrize("fault", ["drop", "stall", "mute"])
def test_what_has_come_is_not_asked_for_again(server, tmp_path, fault):
    (server.root / "a.bin").write_bytes(np.random.default_rng(0).bytes(300_000))
    server.faults["/a.bin"] = [fault, fault]
    download(f"{server.url}/a.bin", tmp_path / "a.bin", lambda file: None)
    assert (tmp_path / "a.bin").read_bytes() == (server.root / "a.bin").read_bytes()
    starts = [int(headers["Range"].removeprefix("bytes=").removesuffix("-")) for _, headers in server.asked[1:]]
    assert starts == sorted(starts)
    assert starts[0] > 0
    assert starts[-1] == 300_000  # the server confirms the end


def test_a_later_run_goes_on_unless_the_file_is_another_by_then(server, tmp_path, monkeypatch):
    content = np.random.default_rng(0).bytes(50_000)
    (server.root / "a.bin").write_bytes(content)
    server.faults["/a.bin"] = ["drop"] * 8
    monkeypatch.setattr(download_module, "TRIES", 2)
    with pytest.raises(GaveUp, match="what has come is kept"):
        download(f"{server.url}/a.bin", tmp_path / "a.bin", lambda file: None)
    part = tmp_path / "a.bin.part"
    got = part.stat().st_size
    assert 0 < got < 50_000
    assert part.read_bytes() == content[:got]
    server.faults["/a.bin"] = []
    server.tag, changed = '"2"', content[::-1]
    (server.root / "a.bin").write_bytes(changed)
    download(f"{server.url}/a.bin", tmp_path / "a.bin", lambda file: None)
    assert (tmp_path / "a.bin").read_bytes() == changed
    assert [file.name for file in tmp_path.glob("a.bin*")] == ["a.bin"]


def test_a_server_that_knows_no_ranges_serves_too(server, tmp_path):
    server.ranges = False
    (server.root / "a.bin").write_bytes(bytes(range(256)) * 100)
    server.faults["/a.bin"] = ["drop", "503", "drop", "long"]
    download(f"{server.url}/a.bin", tmp_path / "a.bin", lambda file: None)
    assert (tmp_path / "a.bin").read_bytes() == (server.root / "a.bin").read_bytes()


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
        opened(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"only data\.name=shards"):
        open_splits(config.load(["data.name=folder", f"data.path={path}"]).data)


@pytest.mark.parametrize("name", ["../../x.tar", "/etc/x.tar", "http://127.0.0.1:9/x.tar", "a//x.tar", "x.zip"])
def test_a_list_that_leads_out_is_refused(server, tmp_path, name):
    (server.root / "_info.json").write_text(json.dumps({"splits": {"train": {"filenames": [name]}}}))
    with pytest.raises(ConfigError, match=r"lead out|lists no shards"):
        opened(f"{server.url}/_info.json")
    assert {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()} == {"_info.json"}


def test_a_redirect_leads_to_the_web_alone(server, tmp_path, monkeypatch):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", "ftp://127.0.0.1/x.tar" if "away" in handler.path else f"{server.url}/there.tar?more")
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    usual = Handler.do_GET
    monkeypatch.setattr(Handler, "do_GET", lambda handler: (usual if "there" in handler.path else redirect)(handler))
    with tarfile.open(server.root / "there.tar", "w") as archive:
        add(archive, "0.png", png(1))
    download(f"{server.url}/x.tar", tmp_path / "x.tar", lambda file: None)
    assert (tmp_path / "x.tar").read_bytes() == (server.root / "there.tar").read_bytes()
    with pytest.raises(ConfigError, match="redirects to ftp"):
        download(f"{server.url}/away.tar", tmp_path / "y.tar", lambda file: None)


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


def test_processes_of_a_machine_fetch_a_file_once(server, tmp_path):
    content = np.random.default_rng(0).bytes(200_000)
    (server.root / "a.bin").write_bytes(content)
    server.faults["/a.bin"] = ["drop", "stall"]
    threads = [threading.Thread(target=download, args=(f"{server.url}/a.bin", tmp_path / "a.bin", lambda file: None)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "a.bin").read_bytes() == content
    assert [file.name for file in tmp_path.glob("a.bin*")] == ["a.bin"]
    assert len(server.asked) == 4  # two faults, the rest, the confirmation
