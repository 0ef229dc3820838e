"""What happens when the training is over: the encoder is exported, pictured and measured, and the run is marked as done."""

import dataclasses
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from mae import config as configuration
from mae.commands import compare, pictures, predictions
from mae.config import Config
from mae.data.sources import Splits
from mae.evaluation import diagnosis, results
from mae.evaluation.features import encodes_itself
from mae.interop import timm_folder
from mae.methods.base import Autoencoder
from mae.methods.build import build
from mae.nets import precision
from mae.nets.vit import choose_attention
from mae.reporting import table
from mae.training import alarms, lineage
from mae.training.run import RunFolder
from mae.training.tracking import Tracker
from mae.training.watch import memory_gib


def close(
    config: Config, folder: RunFolder, splits: Splits, method: Autoencoder, tracker: Tracker, device: torch.device, step: int
) -> None:
    """Exports, pictures and measures a trained method; writes report.html, prints the table."""
    folder.note(**_costs(device))
    if isinstance(method.encoder, VisionTransformer) and not encodes_itself(method):
        timm_folder.save(method.encoder, folder.encoder, data=config.data, tag=folder.path.name)
        tracker.made(lineage.encoder(folder.path.name, folder))
    found = diagnosis.diagnose(method, splits, config, device=device)
    row = {"step": step, **{f"held_out/{k}": v for k, v in found.figures.items()}}
    folder.append(row)
    folder.say([*found.sentences, *alarms.told(folder.rows())])
    tracker.log(row)
    drawn = draw(method, splits, config, device, folder, tracker, step)
    later = pictures.curves(folder.rows(), folder.path)
    entries = results.run_protocols(
        method,
        config,
        splits,
        [configuration.protocol(name) for name in config.evaluate.protocols],
        run_dir=folder.path,
        device=device,
        controls=config.evaluate.controls,
        untrained=lambda: untrained(config, device),
        precision=precision.choose(config.train.precision, device),
        drawn=later.append,
    )
    tracker.pictures(later, step)
    results.add_entries(folder.results, entries)
    tracker.results(entries)
    predictions.send(tracker, splits, config, entries, folder.path)
    tracker.made(lineage.results(folder))
    page = compare.refresh(folder.path)
    print(f"\n{table.text(entries)}\n")
    print("\n".join(found.sentences))
    made = [name for name in ("results.json", "metrics.jsonl") if (folder.path / name).exists()]
    made += ["encoder/ (timm)"] if folder.encoder.exists() else []
    made += [page.name] if page is not None else []
    print(f"\n{folder.path}: {', '.join([*made, *map(str, drawn + later)])}")


def _costs(device: torch.device) -> dict[str, float]:
    """What the training took: peak memory."""
    costs = {"peak_memory_gib": memory_gib(device)}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # another run may follow in this process
    return costs


def draw(
    method: Autoencoder,
    splits: Splits,
    config: Config,
    device: torch.device,
    folder: RunFolder,
    tracker: Tracker,
    step: int,
    *,
    training: bool = False,
) -> list[Path]:
    """Draws what the method can show into the run's figures/ and sends it to W&B; returns the files. `training`: only what is cheap."""
    drawn = pictures.draw(method, splits, config, device, folder.figures, training=training)
    tracker.pictures(drawn, step)
    return drawn


def untrained(config: Config, device: torch.device) -> Autoencoder:
    """The encoder with fresh weights of seed 0, the same for every method: the control that tells what training added."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        method = build(dataclasses.replace(config, method={"name": "untrained"}))
    choose_attention(method, device)
    return method
