"""Tar shards: what tarfile and webdataset write is read, and every damage is found when the shards are indexed."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mae import config
from mae.data import index, shards, tar
from mae.data.decode import DamagedImage
from mae.data.sources import open_splits
from mae.errors import ConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def png(value, size=(6, 5)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, value // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def add(archive, name, content, **header):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in header.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write(path, values, *, labels=True, kind=tarfile.PAX_FORMAT, prefix="", mtime=0):
    with tarfile.open(path, "w", format=kind) as archive:
        for value in values:
            add(archive, f"{prefix}{value:06}.png", png(value), mtime=mtime)
            add(archive, f"{prefix}{value:06}.json", b"{}", mtime=mtime)
            if labels:
                add(archive, f"{prefix}{value:06}.cls", b"%d\n" % (value % 3), mtime=mtime)


def opened(path, *words):
    return open_splits(config.load(["data.name=shards", f"data.path={path}", "data.image_size=32", *words]).data)


def values(source):
    pixels = (source.read(i)[0, 0].astype(int) for i in range(len(source)))
    return [red + 256 * green for red, green, _ in pixels]


def test_named_splits_are_read_by_offset_with_their_labels(tmp_path):
    for part, (split, start) in enumerate([("train", 0), ("train", 40), ("val", 80), ("test", 100)]):
        write(tmp_path / f"x-{split}-{part % 2:04}.tar", range(start, start + 20))
    splits = opened(tmp_path)
    assert values(splits.train) == [*range(20), *range(40, 60)]
    assert values(splits.validation) == [*range(80, 100)]
    assert values(splits.test) == [*range(100, 120)]
    assert splits.train.classes == ("0", "1", "2")
    assert splits.test.labels.tolist() == [v % 3 for v in range(100, 120)]
    assert splits.train.name_of(20) == "x-train-0001.tar/000040.png"
    (tmp_path / "classes.txt").write_text("cat\ndog\nwolf\n")
    assert opened(tmp_path).train.classes == ("cat", "dog", "wolf")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ConfigError, match="names 2 classes"):
        opened(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"chat\nchien\nb\xeate\n")
    with pytest.raises(ConfigError, match=r"classes\.txt cannot be read .* UTF-8"):
        opened(tmp_path)


def test_unnamed_shards_give_a_fifth_to_the_test(tmp_path):
    write(tmp_path / "0.tar", range(50), labels=False)
    splits = opened(tmp_path)
    assert [len(part) for part in splits] == [36, 4, 10]
    assert sorted(values(splits.train) + values(splits.validation) + values(splits.test)) == [*range(50)]
    assert splits.train.labels is None


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.text("abü/.-_ 0", min_size=1, max_size=120), max_size=5, unique=True),
    sizes=st.lists(st.integers(0, 3000), min_size=5, max_size=5),
    kind=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT]),
    mtime=st.sampled_from([0, 1700000000.25]),
)
def test_the_walk_finds_what_tarfile_wrote(tmp_path_factory, names, sizes, kind, mtime):
    path = tmp_path_factory.mktemp("walk") / "a.tar"
    names = [f"d/{name}x" for name in names if ".." not in name.split("/")]
    expected = []
    with tarfile.open(path, "w", format=kind) as archive:
        for name, size in zip(names, sizes, strict=False):
            content = bytes(i % 251 for i in range(size))
            try:
                add(archive, name, content, mtime=int(mtime) if kind == tarfile.USTAR_FORMAT else mtime)
            except ValueError:  # ustar has no room for the name
                continue
            expected.append((name, content))
    raw = path.read_bytes()
    found = [(m.name, raw[m.offset : m.offset + m.size]) for m in tar.members(path)]
    assert found == expected


def test_any_cut_and_any_flipped_header_byte_is_found(tmp_path):
    path = tmp_path / "x-0000.tar"
    write(path, range(4))
    raw = path.read_bytes()
    end = len(raw.rstrip(b"\0")) + 511 & ~511
    for cut in [*range(0, end + 1024, 512), 1, 511, 600, end + 1023]:  # what follows the two blocks at the end is padding
        path.write_bytes(raw[:cut])
        with pytest.raises(ConfigError, match=r"x-0000\.tar .* byte \d+"):
            list(tar.members(path))
    rng = np.random.default_rng(0)
    first, *_, last = (m.offset - 512 for m in _members(raw, path))
    with open(path, "r+b", buffering=0) as file:
        for at in (np.array([first, last, end, end + 512])[:, None] + np.arange(512)).ravel().tolist():  # every byte of a header
            os.pwrite(file.fileno(), bytes([raw[at] ^ int(rng.integers(1, 256))]), at)
            with pytest.raises(ConfigError, match=r"x-0000\.tar .* byte \d+"):
                list(tar.members(path))
            os.pwrite(file.fileno(), raw[at : at + 1], at)
    path.write_bytes(raw[:1024] + bytes(1024) + raw[2048:])  # blocks lost in the middle
    with pytest.raises(ConfigError, match="damaged"):
        list(tar.members(path))


def header(name, size, kind):
    block = bytearray(512)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % (sum(block) + 8 * ord(" "))
    return bytes(block)


@settings(max_examples=300, deadline=None)
@given(
    said=st.lists(st.sampled_from([*b"0123456789", *b"size=path=\n ./\xff\xc3\0", b"12 size=", b"9" * 5000, b"20 path="]), max_size=40),
    kind=st.sampled_from([b"x", b"L", b"g", b"K"]),
    size=st.binary(min_size=12, max_size=12) | st.just(b"00000000012\0"),
)
def test_whatever_a_valid_header_says_is_taken_or_answered(tmp_path_factory, said, kind, size):
    path = tmp_path_factory.getbasetemp() / "hostile.tar"
    text = b"".join(part if isinstance(part, bytes) else bytes([part]) for part in said)
    own = header(b"a.png", size, b"0") + b"0123456789".ljust(512, b"\0")
    path.write_bytes(header(b"x", b"%011o\0" % len(text), kind) + text + bytes(-len(text) % 512) + own + bytes(1024))
    try:
        found = index.index_of_shard(path, path.name)
        assert (found.offsets + found.sizes <= path.stat().st_size).all()
    except ConfigError as error:
        assert "hostile.tar" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [(b"x", b"2 " * 600_000 + b"=", "an extended header of"), (b"x", b"5011 path=%s\n" % (b"y" * 5000), "a name of 5000 letters")],
)
def test_headers_that_want_the_readers_memory_or_time_are_refused(tmp_path, name, said, message):
    (tmp_path / "0.tar").write_bytes(
        header(name, b"%011o\0" % len(said), b"x") + said + bytes(-len(said) % 512) + header(b"a.png", b"", b"0") + bytes(1024)
    )
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_what_is_called_a_shard_and_is_no_file_is_told(tmp_path, make):
    make(tmp_path / "0.tar")
    with pytest.raises(ConfigError, match=r"0\.tar (is no file|cannot be opened)"):
        opened(tmp_path)


def _members(raw, path):
    path.write_bytes(raw)
    return list(tar.members(path))


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("a.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "a link"),
        ("a.png", {"type": tarfile.LNKTYPE, "linkname": "b.png"}, "a link"),
        ("a.png", {"type": tarfile.FIFOTYPE}, "special file"),
        ("/etc/a.png", {}, "leads out"),
        ("x/../../a.png", {}, "leads out"),
    ],
)
def test_links_and_names_that_lead_out_are_refused(tmp_path, name, header, message):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, name, b"", **header)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


def test_missing_shards_are_named(tmp_path):
    for number in (0, 1, 4):
        write(tmp_path / f"x-train-{number:04}.tar", range(3))
    with pytest.raises(ConfigError, match=r"x-train-0002\.tar, x-train-0003\.tar"):
        opened(tmp_path)
    for number in (2, 3):
        write(tmp_path / f"x-train-{number:04}.tar", range(3))
    assert len(opened(tmp_path).train) > 0
    (tmp_path / "_info.json").write_text('{"splits": {"train": {"filenames": ["x-train-0004.tar", "x-train-0005.tar"]}}}')
    with pytest.raises(ConfigError, match=r"lacks .*x-train-0005\.tar:"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": png(1), "a.cls": b"cat"}, "a label is the number of a class"),
        (
            {"a.png": png(1), "a.cls": b"123456789"},
            "a label is the number of a class",
        ),  # an image's number: as many classes fill the memory
        ({"a.png": png(1), "a.jpg": png(1)}, "two images"),
        ({"a.png": png(1), "b.png": png(1), "b.cls": b"0"}, "a.png has no .cls"),
        ({"a.txt": b"no image"}, "hold no images"),
    ],
)
def test_shards_that_say_too_little_are_refused(tmp_path, members, message):
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, content in members.items():
            add(archive, name, content)
    with pytest.raises(ConfigError, match=message):
        opened(tmp_path)


def test_an_empty_folder_is_answered(tmp_path):
    with pytest.raises(ConfigError, match=r"no \.tar shards"):
        opened(tmp_path)


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    write(tmp_path / "x-train-0.tar", range(10))
    before = set(os.listdir(tmp_path))
    first = opened(tmp_path).train.fingerprint
    make, made = index.make_index, []
    monkeypatch.setattr(index, "make_index", lambda *args: made.append(1) or make(*args))
    assert opened(tmp_path).train.fingerprint == first
    assert not made
    assert set(os.listdir(tmp_path)) == before
    write(tmp_path / "x-train-0.tar", range(11))
    assert opened(tmp_path).train.fingerprint != first
    assert made == [1]
    for file in shards.cache_folder().glob("*/*.npy"):
        file.write_bytes(b"damaged")
    opened(tmp_path)
    assert made == [1, 1]


def test_an_index_that_another_rank_stored_meanwhile_is_taken(tmp_path):
    write(tmp_path / "0.tar", range(3))
    made = index.make_index(tmp_path, ["0.tar"])
    first = index.store(tmp_path / "index", made)
    before = os.stat(tmp_path / "index" / "keys.npy").st_ino
    assert index.store(tmp_path / "index", made).keys.tolist() == first.keys.tolist()
    assert os.stat(tmp_path / "index" / "keys.npy").st_ino == before  # its readers may be opening these files
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["index"]


def test_names_that_are_no_unicode_are_names(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        for number in range(4):
            add(archive, os.fsdecode(b"caf\xe9%d.png" % number), png(number))
    splits = opened(tmp_path)
    assert sorted(values(splits.train) + values(splits.validation) + values(splits.test)) == [*range(4)]
    assert os.fsencode(splits.test.name_of(0)).startswith(b"0.tar/caf\xe9")


def test_damage_inside_a_shard_is_named_when_it_is_read(tmp_path):
    write(tmp_path / "x-train-0.tar", range(4))
    write(tmp_path / "x-test-0.tar", range(4))
    source = opened(tmp_path, "data.validation=0.25").test
    with open(tmp_path / "x-test-0.tar", "r+b") as file:
        file.seek(int(source.index.offsets[2]))
        file.write(b"noise")
    with pytest.raises(DamagedImage, match=r"x-test-0\.tar/000002\.png"):
        source.read(2)
    os.truncate(tmp_path / "x-test-0.tar", int(source.index.offsets[3]) + 5)
    with pytest.raises(DamagedImage, match="cut short"):
        source.read(3)
    assert source.read(0).shape == (5, 6, 3)


def test_a_source_crosses_processes_and_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "OPEN_FILES", 2)
    for number in range(5):
        write(tmp_path / f"x-train-{number}.tar", [number])
        write(tmp_path / f"x-test-{number}.tar", [number])
    source = opened(tmp_path).test
    assert values(source) == values(source) == [*range(5)]
    assert len(source._open) == 2
    copied = pickle.loads(pickle.dumps(source))
    assert values(copied) == [*range(5)]
    assert copied.fingerprint == source.fingerprint
