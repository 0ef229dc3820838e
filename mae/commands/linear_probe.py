"""The story of the linear probe: from features extracted once (quick), or with augmentation as in the paper."""

import json
from collections.abc import Sequence

from mae.commands import door, encoders, finetune
from mae.data.sources import open_splits

USAGE = """
usage: linear_probe.py RUN [configs/evaluation/linear_probe_paper.yaml] [section.key=value ...]

Trains a linear classifier on the frozen encoder of a pretraining run. Without a file: linear_probe_quick, all learning rates at
once over features extracted once. linear_probe_paper runs the encoder on augmented images in every epoch, with LARS.
"""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, protocol="linear_probe_quick")


def _story(words: list[str]) -> None:
    cfg, folder = encoders.configure(words, kind="linear_probe", default="linear_probe_quick")
    if "auto_augment" in cfg.protocol:
        finetune.story(words, "linear_probe", "linear_probe_quick")
        return
    splits = open_splits(cfg.data)
    encoders.require_labels(cfg, splits)

    import mae
    from mae.commands import closing
    from mae.evaluation import results
    from mae.nets.vit import choose_attention
    from mae.reporting import table
    from mae.training import distributed, precision
    from mae.training.tracking import Tracker

    with distributed.start(cfg.train.device) as ranks:
        if not ranks.first:
            return
        method = mae.load(folder.path).to(ranks.device)
        choose_attention(method, ranks.device)
        entries = results.run_protocols(
            method,
            cfg,
            splits,
            [cfg.protocol],
            run_dir=folder.path,
            device=ranks.device,
            controls=cfg.evaluate.controls,
            untrained=lambda: closing.untrained(cfg, ranks.device),
            precision=precision.choose(cfg.train.precision, ranks.device),
        )
        results.add_entries(folder.results, entries)
        tracker = Tracker(cfg, folder.path, "linear_probe", name=folder.path.name, derived={})
        tracker.results(entries)
        tracker.finish()
    print(table.text(entries))
    chosen = json.dumps(entries[0]["settings"]) if entries else "nothing"
    print(f"\nsettings: {chosen}\n{folder.results}")
