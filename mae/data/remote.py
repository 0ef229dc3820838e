"""Tar shards behind http(s): brought once into the user's cache folder, from where they are read like any others.

An exact order needs an index of all shards, so all of them come before the first step. What has come is never asked for again: the
data of a finished download need no network.
"""

import json
import logging
import math
import posixpath
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from tqdm import tqdm

from mae.data import tar
from mae.data.download import GaveUp, download
from mae.errors import ConfigError
from mae.keys import public

CONNECTIONS = 4
MOST = 1_000_000  # shards
INFO = "_info.json"


def fetch(path: str, cache: Path) -> tuple[Path, list[str]]:
    """The shards that a URL means, once all of them lie in `cache`: (folder, their paths below it, sorted).

    `path`: https://HOST/train-{000000..000099}.tar with any braces, or the URL of a list: timm's _info.json, or .txt with a shard a
    line, whose names are relative to it. A query (a signed URL's) goes with every request. Raises ConfigError for another kind of URL
    and, naming all, for shards that do not come.
    """
    parts = urlsplit(path)
    _check_scheme(path)
    where = cache / re.sub(r"[^\w.-]", "_", parts.netloc.rpartition("@")[2])
    listed = parts.path.endswith((".json", ".txt"))
    places = _listed(path, where) if listed else _expanded(path)
    folder = posixpath.dirname(parts.path) if listed else posixpath.commonpath([posixpath.dirname(place) for place in places])
    root = where / folder.lstrip("/")
    files = {place: where / place.lstrip("/") for place in places}
    _bring({_url(path, place): file for place, file in files.items()}, root, public(path) or path)
    return root, sorted(file.relative_to(root).as_posix() for file in files.values())


def urls_of(path: str) -> list[str]:
    """The URLs of the shards that a pattern with braces means; nothing is asked for. Raises ConfigError for another kind of URL."""
    _check_scheme(path)
    return [_url(path, place) for place in _expanded(path)]


def _check_scheme(path: str) -> None:
    parts = urlsplit(path)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(
            f"data.path {public(path)} cannot be read: give a folder or a URL with http:// or https:// (no pipe:, no s3:, no commands)"
        )


def _expanded(path: str) -> list[str]:
    """The paths, from the host's root, of a pattern with braces."""
    from braceexpand import braceexpand  # it comes with webdataset

    pattern = urlsplit(path).path
    ranges = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(\d+)\.\.(\d+)", pattern)]
    if math.prod(ranges) > MOST:  # asked before, for braceexpand makes them all
        raise ConfigError(f"data.path {public(path)} means more than {MOST:,} shards: check the ranges in its braces")
    try:
        places = list(dict.fromkeys(braceexpand(pattern)))
    except ValueError as error:
        raise ConfigError(f"data.path {public(path)}: the braces do not close, write {{000..099}} for a hundred shards") from error
    wrong = [place for place in places if not place.endswith(".tar")]
    if wrong:
        raise ConfigError(
            f"data.path {public(path)} names no shards, {wrong[0]} does not end in .tar: give https://HOST/train-{{000..099}}.tar, "
            f"or the URL of a list, {INFO} or .txt"
        )
    return [_safe(place, path) for place in places]


def _listed(path: str, where: Path) -> list[str]:
    """The paths, from the host's root, of the shards in a list."""
    own = _safe(urlsplit(path).path, path)
    file = where / own.lstrip("/")
    download(path, file, _readable)
    text = file.read_text()
    try:
        if own.endswith(".json"):
            names = [name for split in json.loads(text)["splits"].values() for name in split["filenames"]]
        else:
            names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names or not all(isinstance(name, str) and name.endswith(".tar") for name in names):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{public(path)} lists no shards: {INFO} has splits with filenames, a .txt one NAME.tar a line") from error
    return [_safe(f"{posixpath.dirname(own)}/{name}", path, name) for name in dict.fromkeys(names)]


def _safe(place: str, path: str, name: str | None = None) -> str:
    """The place itself. Raises ConfigError where it would not lie below the folder of its host or list."""
    steps = (name or place.lstrip("/")).split("/")
    if "" in steps or "." in steps or ".." in steps or "\\" in place or "://" in (name or ""):
        raise ConfigError(
            f"{public(path)} names {public(name) or place}, which may lead out of the cache folder: plain relative names are taken"
        )
    return place


def _bring(files: dict[str, Path], root: Path, shown: str) -> None:
    missing = {url: file for url, file in files.items() if not file.exists()}
    if not missing:
        return
    logging.getLogger("mae").info("%s: %d of %d shards come into %s", shown, len(missing), len(files), root)
    failed: list[str] = []

    def bring(url: str) -> None:
        """One shard; what is wrong with it is told after the others have been tried."""
        try:
            download(url, missing[url], _whole)
        except GaveUp:
            raise
        except ConfigError as error:
            failed.append(str(error))

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(tqdm(pool.map(bring, missing), total=len(missing), unit="shard", disable=None))
    if failed:
        more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise ConfigError(f"{len(failed)} of {len(files)} shards did not come: {'; '.join(sorted(failed)[:3])}{more}")


def _whole(file: Path) -> None:
    """Raises ConfigError for an archive that is cut or damaged; a server may be wrong about a length."""
    for _ in tar.members(file):
        pass


def _readable(file: Path) -> None:
    """Raises ConfigError for a list that is no text."""
    try:
        text = file.read_text()
        if file.name.removesuffix(".part").endswith(".json"):
            json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name.removesuffix('.part')} is no text or JSON") from error


def _url(path: str, place: str) -> str:
    return urlunsplit(urlsplit(path)._replace(path=place, fragment=""))
