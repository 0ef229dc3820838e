"""The story of evaluation: one encoder, any protocols, one pass over the images for all that read features."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae import config
from mae.commands import door, encoders, finetune
from mae.commands.encoders import Found
from mae.config import Config
from mae.data.sources import open_splits
from mae.errors import ConfigError

if TYPE_CHECKING:  # a wrong word is answered before torch is imported
    from mae.methods.base import Autoencoder

USAGE = """
usage: mae evaluate ENCODER [configs/evaluation/X.yaml ...] [section.key=value ...]

Measures an encoder by any protocols of configs/evaluation, each beside its controls, and adds the figures to its results.json.
ENCODER: the folder of a run, a checkpoint file (timm, official MAE, Hugging Face), timm:NAME or hf:NAME. The images are those that
the run was trained on, or others: configs/data/X.yaml data.path=DIR. Without a protocol: those of evaluate.protocols.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, of_encoder=True)


def _story(words: list[str]) -> None:
    word, words = encoders.one_encoder(words)
    files = encoders.evaluations(words)
    shared = [w for w in words if w not in files]
    if len(files) != 1 and any(w.startswith("protocol.") for w in shared):
        raise ConfigError("protocol.* settings belong to one protocol: name one file of configs/evaluation, or change a copy of the file")
    trained = [f for f in files if "auto_augment" in config.protocol(f)]
    found = encoders.find(word)
    read = [f for f in files if f not in trained]
    if read or not files:
        cfg = encoders.configure([*read[:1], *shared] if len(read) == 1 else shared, found.base)
        protocols = [cfg.protocol] if len(read) == 1 else [config.protocol(f) for f in read or cfg.evaluate.protocols]
        measure(cfg, found, protocols, job="evaluate")
    for file in trained:
        finetune.story([word, file, *shared], config.protocol(file)["name"].split("/")[0], file)


def _other(word: str, cfg: Config) -> "tuple[Autoencoder, Config]":
    """Another encoder and the configuration with which it reads the images of `cfg`."""
    found = encoders.find(word)
    data = {**dataclasses.asdict(cfg.data), **{key: found.base["data"][key] for key in encoders.OF_ENCODER}}
    return found.load(), encoders.configure([], {**found.base, "data": data})


def measure(cfg: Config, found: Found, protocols: Sequence[Mapping[str, Any]], *, job: str) -> None:
    """Measures by protocols that train no weights of the encoder, adds the entries to the encoder's results and prints them.

    Under torchrun the ranks share the images out, and each image is counted once. `job` is W&B's job type.
    """
    splits = open_splits(cfg.data)

    from mae.commands import closing, compare, predictions  # torch: only once words and data are known to be good
    from mae.evaluation import results
    from mae.evaluation.features import Share
    from mae.interop.resize import resize
    from mae.nets import precision
    from mae.nets.vit import choose_attention
    from mae.reporting import table
    from mae.training import distributed, lineage
    from mae.training.tracking import Tracker

    with distributed.start(cfg.train.device) as ranks:
        model = resize(found.load(), image_size=cfg.image_size, channels=cfg.data.channels).to(ranks.device)
        choose_attention(model, ranks.device)
        drawn: list[Path] = []
        entries = results.run_protocols(
            model,
            cfg,
            splits,
            protocols,
            run_dir=found.home.path,
            device=ranks.device,
            controls=cfg.evaluate.controls,
            untrained=lambda: closing.untrained(cfg, ranks.device),
            precision=precision.choose(cfg.train.precision, ranks.device),
            name=found.name,
            share=Share(ranks.rank, ranks.world, lambda rows: distributed.join(rows, ranks)),
            open_other=lambda word: _other(word, cfg),
            drawn=drawn.append,
        )
        if not ranks.first:
            return
        results.add_entries(found.home.results, entries)
        compare.refresh(found.home.path)
        tracker = Tracker(cfg, found.home.path, job, name=found.home.path.name, derived={})
        for artifact in (lineage.data_set(cfg, splits), lineage.encoder(found.name, found.home)):
            tracker.uses(artifact)
        tracker.results(entries)
        tracker.pictures(drawn, step=0)
        predictions.send(tracker, splits, cfg, entries, found.home.path)
        tracker.made(lineage.results(found.home))
        tracker.finish()
    print(f"{table.text(entries)}\n\n{found.home.results}")
