"""One file over http(s), whole: what a flaky server leaves out is asked for again from where it stopped, and what it claims is checked.

A file has its name only once it is complete. Before that it is NAME.part, which a later try, or a later run, goes on with as long
as the server's validator (ETag or Last-Modified) is the same; the lock on it lets one process of a machine fetch at a time.
"""

import base64
import fcntl
import http.client
import os
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPMessage
from pathlib import Path
from typing import IO, BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import Request

from mae.errors import ConfigError
from mae.keys import public

TRIES = 8  # in a row without progress
PROGRESS = 1 << 20  # bytes that begin the count anew
SILENCE_SECONDS = 20.0  # of a server, until the connection is given up
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds; doubled from try to try
CHUNK = 1 << 18
PASSING = (408, 425, 429, 500, 502, 503, 504, 520, 522, 524)  # HTTP codes of troubles that pass


class _Trouble(Exception):
    """What another try may mend. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class GaveUp(ConfigError):
    """The server cannot be reached, or gives nothing: other files of it need not be tried."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows to http(s) alone, and from https to https alone."""

    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str) -> Request | None:
        """As urllib's, which would follow to ftp too."""
        if urlsplit(newurl).scheme not in ({"https"} if req.type == "https" else {"http", "https"}):
            raise ConfigError(f"{public(req.full_url)} redirects to {public(newurl)}: only http(s) is followed, and from https only https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_SafeRedirects)


def download(url: str, file: Path, check: Callable[[Path], object]) -> None:
    """Brings a file unless it is there. `check` is given the complete file under another name and raises ConfigError for a damaged one.

    Raises ConfigError, without the URL's secrets, for a file that the server does not have or does not give, for one that stays damaged,
    and, as GaveUp, after TRIES tries in a row without progress.
    """
    if file.exists():
        return
    part = file.with_name(file.name + ".part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        appended = open(part, "ab")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise ConfigError(f"{part} cannot be written ({error.strerror}): choose another folder with XDG_CACHE_HOME=DIR") from error
    with appended as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if file.exists():  # another process brought it meanwhile
            if stream.tell() == 0:
                part.unlink(missing_ok=True)
            return
        _complete(url, stream, part, check)
        os.fsync(stream.fileno())
        os.replace(part, file)
        _tag_of(part).unlink(missing_ok=True)


def _complete(url: str, stream: BinaryIO, part: Path, check: Callable[[Path], object]) -> None:
    failures = 0
    while True:
        before = stream.seek(0, os.SEEK_END)
        try:
            _bring(url, stream, _tag_of(part))
            stream.flush()
            try:
                check(part)
                return
            except ConfigError as error:
                stream.truncate(0)
                raise _Trouble(f"what came is damaged, {error}") from error
        except (_Trouble, OSError, http.client.HTTPException) as error:
            gained = stream.seek(0, os.SEEK_END) - before
            missed = 2 if isinstance(error, urllib.error.URLError) else 1  # nobody is there: half the tries
            failures = missed if gained >= PROGRESS else failures + missed
            if failures >= TRIES:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise GaveUp(f"{public(url)} does not come, try after try ({reason}): try it again later, what has come is kept") from error
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * random.uniform(0.5, 1)  # the ranks of a job ask apart
            time.sleep(max(wait, min(getattr(error, "wait", 0.0), LONGEST_WAIT)))


def _bring(url: str, stream: BinaryIO, tag: Path) -> None:
    """Reads on from the stream's end until the server itself says that nothing follows. Raises _Trouble, or what the connection raises."""
    whole = False  # a body came to the end that was announced
    while True:
        size = stream.seek(0, os.SEEK_END)
        with _answer(url, size, tag) as answer:
            if answer.status == 416:  # nothing from `size` on
                total = _total(answer)
                if size and total in (size, None):
                    return
                stream.truncate(0)
                raise _Trouble(f"the file has {total} bytes there and {size} here")
            if answer.headers.get("Content-Encoding", "identity") != "identity":
                raise ConfigError(f"{public(url)} comes as {answer.headers['Content-Encoding']}: let the server send the file as it is")
            total = _total(answer)
            if answer.status == 200:
                if whole and total in (size, None):
                    return  # a server that knows no ranges, and says the same length again
                stream.truncate(0)
                size = 0
                tag.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
            elif not re.match(rf"bytes {size}-", answer.headers.get("Content-Range", "")):
                stream.truncate(0)
                raise _Trouble(f"asked for bytes from {size}, the server gave {answer.headers.get('Content-Range')}")
            while chunk := answer.read1(CHUNK):  # what there is: a stall loses nothing
                stream.write(chunk)
                size += len(chunk)
            stream.flush()
            if total is None and answer.status == 206:
                raise _Trouble("the server does not say how long the file is")
            if total is not None and size != total:
                raise _Trouble(f"the connection ended after {size:,} of {total:,} bytes")
            whole = True


def answer(url: str) -> http.client.HTTPResponse:
    """The server's answer to a request for the file, asked for once. Raises OSError or, for what will not pass, ConfigError."""
    try:
        return _answer(url, 0, Path())
    except _Trouble as error:
        raise OSError(str(error)) from error


def _answer(url: str, size: int, tag: Path) -> http.client.HTTPResponse:
    """The server's answer to a request for the bytes from `size` on. Raises _Trouble or, for what will not pass, ConfigError."""
    parts = urlsplit(url)
    request = urllib.request.Request(urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])), headers={"User-Agent": "mae"})
    request.add_header("Accept-Encoding", "identity")
    if "@" in parts.netloc:
        user = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(user).decode())
    if size:
        request.add_header("Range", f"bytes={size}-")
        validator = tag.read_text() if tag.exists() else ""
        if validator and not validator.startswith("W/"):
            request.add_header("If-Range", validator)  # another file there by now: it comes from its start
    try:
        return _opener.open(request, timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error  # type: ignore[return-value]  # it reads like an answer
        if error.code not in PASSING:
            raise ConfigError(f"{public(url)} cannot be had, the server says {error.code} {error.reason}: check data.path") from error
        raise _Trouble(f"the server says {error.code} {error.reason}", _number(error.headers.get("Retry-After", "")) or 0) from error


def _total(answer: http.client.HTTPResponse) -> int | None:
    """The length of the whole file, as this answer has it."""
    if answer.status == 200:
        return _number(answer.headers.get("Content-Length", ""))
    return _number(answer.headers.get("Content-Range", "").rpartition("/")[2])


def _number(text: str) -> int | None:
    """What a header says; None for anything but a plain number: a server may say what it likes."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".tag")
