"""A file comes over http whole, once, and from where it stopped, or is told in one sentence."""

import shutil
import ssl
import subprocess
import tarfile
import threading
from urllib.request import HTTPSHandler, build_opener

import numpy as np
import pytest
from flaky_server import Handler, serving
from test_data_shards import add, png

from mae.data import download as download_module
from mae.data.download import GaveUp, download
from mae.errors import ConfigError


@pytest.fixture
def server(tmp_path, monkeypatch):
    yield from serving(tmp_path, monkeypatch)


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


@pytest.mark.parametrize("length", ["9" * 5000, "\xb2", "-5", "1e3", "12 13"])
def test_a_server_may_say_what_it_likes_of_lengths_and_waits(server, tmp_path, monkeypatch, length):
    def odd(handler):
        handler.send_response(503 if "busy" in handler.path else 200)
        handler.send_header("Retry-After" if "busy" in handler.path else "Content-Length", length)
        handler.end_headers()
        handler.wfile.write(b"x" * 100)
        handler.close_connection = True

    monkeypatch.setattr(Handler, "do_GET", odd)
    download(f"{server.url}/a.bin", tmp_path / "a.bin", lambda file: None)  # as from one that says none: `check` has to tell
    assert (tmp_path / "a.bin").read_bytes() == b"x" * 100
    with pytest.raises(GaveUp, match="does not come"):
        download(f"{server.url}/busy.bin", tmp_path / "busy.bin", lambda file: None)


def test_a_cache_that_cannot_be_written_is_told(server, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        download(f"{server.url}/a.bin", tmp_path / "cache" / "a.bin", lambda file: None)
    assert not server.asked


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


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate")
def test_https_is_verified_and_never_left(server, tmp_path, monkeypatch):
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(certificate, key)
    server.socket = server_side.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    (server.root / "a.bin").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(ConfigError, match=r"(?i)certificate verify failed"):
        download(f"{url}/a.bin", tmp_path / "a.bin", lambda file: None)
    trusting = HTTPSHandler(context=ssl.create_default_context(cafile=certificate))
    monkeypatch.setattr(download_module, "_opener", build_opener(trusting, download_module._SafeRedirects))
    server.faults["/a.bin"] = ["drop", "503"]
    download(f"{url}/a.bin", tmp_path / "a.bin", lambda file: None)
    assert (tmp_path / "a.bin").read_bytes() == (server.root / "a.bin").read_bytes()

    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", f"{server.url}/a.bin")
        handler.end_headers()

    monkeypatch.setattr(Handler, "do_GET", redirect)
    with pytest.raises(ConfigError, match="from https only https"):
        download(f"{url}/b.bin", tmp_path / "b.bin", lambda file: None)


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
