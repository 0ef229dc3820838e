"""Walks the headers of a tar archive (POSIX ustar and pax, GNU long names) and distrusts all of them.

Python's tarfile ends silently at a cut or a damaged header, so every block is checked here: header checksums, sizes that
stay inside the file, and the two empty blocks that must end an archive. Nothing is unpacked.
"""

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mae.errors import ConfigError

BLOCK = 512
EMPTY = bytes(BLOCK)
CHECKSUM = re.compile(rb"[0-7]+(\0 | \0|\0| )?")  # the ways in which writers end the number
RECORD = re.compile(rb"(\d{1,18}) ([^=]{1,255})=")  # of a pax header: its length and its key
HEAD = 1024  # bytes of content that are read together with a header: enough for a label or a pax record
LONGEST = 4096  # bytes of a name, as of a path
MOST_SAID = 1 << 20  # bytes that an extended header may take: whoever made a longer one wants the reader's memory


class Member(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int  # of its first byte in the archive
    size: int
    head: bytes  # its first bytes, at most HEAD


def members(path: Path) -> Iterator[Member]:
    """The regular files of an archive in order.

    Raises ConfigError, naming archive and offset, where it is cut short or damaged or holds links, devices or names that
    lead out of a folder.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep it waiting
    except OSError as error:
        raise ConfigError(f"{path} cannot be opened ({error.strerror}): make it readable or move it out of data.path") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ConfigError(f"{path} is no file: move it out of data.path")
        yield from _walk(fd, path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): copy or write it again") from error
    finally:
        os.close(fd)


def _walk(fd: int, path: Path) -> Iterator[Member]:
    total, offset = os.fstat(fd).st_size, 0
    name = size = None  # what an extended header says about the next member
    while True:
        blocks = os.pread(fd, BLOCK + HEAD, offset)
        header = blocks[:BLOCK]
        if len(header) < BLOCK:
            raise ConfigError(f"{path} is cut short at byte {offset}: there is no end-of-archive mark, copy or write it again")
        if header == EMPTY:
            return _check_end(fd, path, offset, total)
        if not CHECKSUM.fullmatch(header[148:156]) or _number(header[148:156]) != sum(header[:148]) + sum(header[156:]) + 8 * ord(" "):
            raise ConfigError(f"{path} is damaged at byte {offset}: the header's checksum is wrong, copy or write it again")
        kind = header[156:157]
        own_size = _number(header[124:136])
        length = own_size if size is None or kind in b"xgLK" else size
        start = offset + BLOCK
        if length < 0 or start + length > total:
            raise ConfigError(
                f"{path} is cut short at byte {total}: the file at byte {offset} needs {length} bytes, copy or write it again"
            )
        offset = start + -(-length // BLOCK) * BLOCK
        if kind in b"xL":
            if length > MOST_SAID:
                raise ConfigError(f"{path} is damaged at byte {start - BLOCK}: an extended header of {length} bytes, write it again")
            content = os.pread(fd, length, start)
            if kind == b"L":
                name = _text(content)
            else:
                records = _pax(content)
                name = records.get("path", name)
                size = _whole(records["size"]) if "size" in records else size
            continue
        if kind in b"gK":
            continue
        own_name = _name(header) if name is None else name
        name = size = None
        _check_member(path, own_name, kind, start - BLOCK)
        if kind != b"5" and not own_name.endswith("/"):
            yield Member(own_name, start, length, blocks[BLOCK : BLOCK + min(length, HEAD)])


def _check_end(fd: int, path: Path, offset: int, total: int) -> None:
    if total < offset + 2 * BLOCK:
        raise ConfigError(f"{path} is cut short at byte {total}: the end-of-archive mark is half there, copy or write it again")
    for at in range(offset, total, 1 << 20):
        rest = os.pread(fd, 1 << 20, at)
        if rest.count(0) != len(rest):
            raise ConfigError(f"{path} is damaged at byte {offset}: an empty header with more files after it, copy or write it again")


def _check_member(path: Path, name: str, kind: bytes, offset: int) -> None:
    if len(name) > LONGEST:
        raise ConfigError(f"{path} holds a name of {len(name)} letters at byte {offset}: write it again with names of at most {LONGEST}")
    if kind not in b"\x00057":
        what = "a link" if kind in b"12" else "a special file"
        raise ConfigError(f"{path} holds {what}, {name!r} at byte {offset}: shards hold plain files only, write it again without")
    if name.startswith("/") or ".." in name.split("/"):
        raise ConfigError(
            f"{path} holds the name {name!r} at byte {offset}, which leads out of its folder: write it again with relative names"
        )


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""  # GNU archives keep times there
    return f"{prefix}/{name}" if prefix else name


def _number(raw: bytes) -> int:
    """A number field: octal text, or binary where the first bit is set (GNU, for sizes from 8 GiB); -1 for neither."""
    if raw[0] & 0x80:
        return int.from_bytes(raw[1:], "big")
    text = raw.strip(b" \0")
    return int(text, 8) if re.fullmatch(b"[0-7]+", text) else 0 if not text else -1


def _whole(text: str) -> int:
    """A decimal number; -1 for what is none."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else -1


def _pax(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    records, at = {}, 0
    while match := RECORD.match(content, at):
        end = at + max(int(match[1]), 1)
        records[_text(match[2])] = content[match.end() : end - 1].decode("utf-8", "surrogateescape")
        at = end
    return records
