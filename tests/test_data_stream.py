"""Streaming: another mode than shards, which says that it is not exact and refuses what needs exactness."""

import http.server
import io
import logging
import os
import tarfile
import threading
from functools import partial
from itertools import islice

import pytest
import torch
from PIL import Image

from mae import config
from mae.data.loader import evaluation_batches, train_batches
from mae.data.sources import open_splits
from mae.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def shards(tmp_path):
    """Four shards of ten images whose red is their number; also a trap that no stream may open."""
    for shard in range(4):
        with tarfile.open(tmp_path / f"x-{shard}.tar", "w") as archive:
            for i in range(10):
                buffer = io.BytesIO()
                Image.new("RGB", (8, 8), (10 * shard + i, 0, 0)).save(buffer, "PNG")
                for ending, content in (("png", buffer.getvalue()), ("pkl", b"cos\nsystem\n(S'exit'\ntR.")):
                    member = tarfile.TarInfo(f"{i}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return tmp_path


def configured(path, *words):
    base = ["data.name=stream", f"data.path={path}", "data.length=30", "data.image_size=8", "data.crop_scale=[1,1]", "data.flip=false"]
    return config.load([*base, "encoder.patch_size=4", "data.workers=0", "train.batch_size=6", *words])


def seen(path, *words, first=0, count=20, **ranks):
    """The numbers of the images, and the keys, of some steps."""
    c = configured(path, *words)
    steps = islice(train_batches(open_splits(c.data).train, c, first_step=first, device=CPU, **ranks), count)
    batches = [step[0] for step in steps]
    return [b.images[:, 0, 0, 0].tolist() for b in batches], torch.cat([b.keys for b in batches])


def test_a_stream_gives_full_batches_of_all_shards_but_the_last_and_says_what_it_is(shards, caplog):
    with caplog.at_level(logging.WARNING, "mae"):
        numbers, keys = seen(shards)
    assert "not exact" in caplog.text
    assert {len(batch) for batch in numbers} == {6}
    assert {n for batch in numbers for n in batch} == set(range(30))
    assert len(keys.unique()) == 120
    assert numbers != seen(shards, first=5)[0]  # a new stream
    c = configured(shards)
    assert {int(b.images[0, 0, 0, 0]) for b in evaluation_batches(open_splits(c.data).validation, c, batch_size=1, device=CPU)} == set(
        range(30, 40)
    )


def test_ranks_read_different_shards_and_never_wait_for_each_other(shards):
    ranks = [{n for batch in seen(shards, world=3, rank=r, count=40)[0] for n in batch} for r in range(3)]
    assert sorted(map(sorted, ranks)) == [list(range(0, 10)), list(range(10, 20)), list(range(20, 30))]
    with pytest.raises(ConfigError, match="3 shards cannot be shared by 6"):
        seen(shards, world=6)


def test_a_damaged_shard_is_told_and_left(shards, caplog):
    content = (shards / "x-1.tar").read_bytes()
    (shards / "x-1.tar").write_bytes(b"\xff" * 5000 + content[5000:])
    numbers, _ = seen(shards, count=40)
    assert {n for batch in numbers for n in batch} == {*range(10), *range(20, 30)}
    assert "x-1.tar" in caplog.text


@pytest.mark.parametrize(
    ("path", "words", "message"),
    [
        ("pipe:cat /etc/passwd", [], "no pipe:"),
        ("s3://bucket/x-{0..3}.tar", [], "http"),
        ("file:///etc/x-{0..3}.tar", [], "http"),
        (None, ["data.length=null"], "data.length is missing"),
        (None, ["data.cache=ram"], r"data\.cache=none"),
        (None, ["evaluate.protocols=[knn]"], r"evaluate\.protocols=\[\]"),
    ],
)
def test_what_is_unsafe_or_needs_an_order_is_refused(shards, path, words, message):
    with pytest.raises(ConfigError, match=message):
        open_splits(configured(path or shards, *words).data)


class Cutting(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; closes the connection in the middle of x-1.tar."""

    def copyfile(self, source, outputfile):
        """Sends half of what it promised."""
        outputfile.write(source.read(8000 if self.path.endswith("x-1.tar") else -1))

    def log_message(self, *_):
        """Says nothing."""


def test_shards_of_a_server_are_streamed_and_a_lost_connection_is_told(shards, caplog):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Cutting, directory=shards))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        numbers, _ = seen(f"http://127.0.0.1:{server.server_port}/x-{{0..3}}.tar", count=40)
    finally:
        server.shutdown()
        server.server_close()
    assert {*range(10), *range(20, 30)} < {n for batch in numbers for n in batch} < set(range(30))
    assert "x-1.tar" in caplog.text
    assert not os.environ.get("WDS_SECURE")  # not needed: none of webdataset's openers is used
