"""What a job reads and makes, as W&B artifacts: data -> pretraining -> encoder -> evaluation -> results."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mae.config import Config
from mae.data.sources import Splits
from mae.keys import public
from mae.training.run import RunFolder


class Artifact(NamedTuple):
    """Something that W&B draws between the jobs. The same content is the same version to it, whoever names it."""

    name: str
    kind: str  # dataset | model | evaluation
    facts: Mapping[str, Any]  # sent as metadata, and as facts.json where no path is
    path: Path | None = None  # a folder or file that is sent with it

    def built(self, wandb: Any) -> Any:
        """As W&B's own class."""
        made = wandb.Artifact(re.sub(r"[^\w.-]+", "-", self.name).strip("-")[:128], type=self.kind, metadata=dict(self.facts))
        if self.path is None:
            with made.new_file("facts.json") as file:
                file.write(json.dumps(self.facts, indent=1, sort_keys=True))
        elif self.path.is_dir():
            made.add_dir(str(self.path))
        else:
            made.add_file(str(self.path))
        return made


def data_set(config: Config, splits: Splits) -> Artifact:
    """The images, by reference: where they lie, how many they are and their fingerprint. None of them is sent."""
    counts = {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test) if splits.test is not None else 0}
    facts = {"name": config.data.name, "path": public(config.data.path), "fingerprint": splits.train.fingerprint, "images": counts}
    return Artifact(f"{config.data.name}-{splits.train.fingerprint}", "dataset", facts)


def encoder(name: str, home: RunFolder) -> Artifact:
    """The encoder of a run, with its weights where they are exported; any other by its name."""
    if home.encoder.is_dir():
        return Artifact(f"{home.path.resolve().name}-encoder", "model", {"run": home.path.resolve().name}, home.encoder)
    return Artifact(f"{name}-encoder", "model", {"encoder": public(name)})


def results(home: RunFolder) -> Artifact:
    """Every figure of a run so far."""
    return Artifact(f"{home.path.resolve().name}-results", "evaluation", {"run": home.path.resolve().name}, home.results)
