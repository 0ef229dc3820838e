"""Pictures of runs side by side, inside the page: shrunk where they are large, and within one budget for all."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mae.reporting import measures
from mae.reporting.records import Group

BUDGET = 12_000_000  # characters of all pictures together in one page
DRAWN_IN_THE_PAGE = ("curves",)  # as charts of its own
SMALL = 60_000  # bytes up to which a file goes in as it is
WIDEST = 1400  # pixels of a larger one
NAMES = {
    "reconstructions": "Reconstructions of held-out images",
    "reconstructions-given": "Reconstructions of other images",
    "neighbours": "Nearest neighbours",
    "attention": "Attention of the last block",
    "samples": "Samples from the model",
    "interpolations": "From one image to another",
    "latent_walk": "One number of the code at a time",
    "atoms": "What each unit of the dictionary looks for",
}


class Picture(NamedTuple):
    """A picture in the page."""

    row: str
    source: str  # data URI
    width: int
    height: int


class Album(NamedTuple):
    """The pictures by what they show, and the names of those that did not fit."""

    shelves: dict[str, list[Picture]]
    left_out: list[str]


def album(groups: Sequence[Group]) -> Album:
    """Every figures/*.png of the first run of each row, those of one name together; reconstructions and samples first."""
    files: dict[str, list[tuple[str, Path]]] = {}
    for g in groups:
        for file in sorted((g.records[0].path / "figures").glob("*.png")):
            if file.stem in DRAWN_IN_THE_PAGE:
                continue
            files.setdefault(file.stem, []).append((g.name, file))
    order = [*(n for n in NAMES if n in files), *sorted(n for n in files if n not in NAMES)]
    shelves: dict[str, list[Picture]] = {}
    left_out, spent = [], 0
    for name in order:
        for row, file in files[name]:
            try:
                picture = _embedded(row, file)
            except OSError:  # a picture that a kill cut off
                left_out.append(f"{name} of {row}, a damaged file")
                continue
            if spent + len(picture.source) > BUDGET:
                left_out.append(f"{name} of {row}")
                continue
            spent += len(picture.source)
            shelves.setdefault(title(name), []).append(picture)
    return Album(shelves, left_out)


def title(name: str) -> str:
    """What a file's pictures show, for people."""
    if name in NAMES:
        return NAMES[name]
    words = dict.fromkeys(measures.spoken(part) for part in name.split("-"))  # PROTOCOL-PICTURE, both may be called alike
    text = ": ".join(words)
    return text[:1].upper() + text[1:]


def _embedded(row: str, file: Path) -> Picture:
    with Image.open(file) as image:
        image.load()
        if file.stat().st_size <= SMALL:
            return Picture(row, _uri(file.read_bytes(), "png"), *image.size)
        small = image.convert("RGBA" if "transparency" in image.info or image.mode in ("RGBA", "LA") else "RGB")
        small.thumbnail((WIDEST, 4 * WIDEST), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=88)
        return Picture(row, _uri(stream.getvalue(), "webp"), *small.size)


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
