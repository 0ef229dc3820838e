"""An encoder as a program that torch.export.load opens wherever torch is, without timm and without this project."""

from pathlib import Path

import torch

from mae.interop import graph
from mae.keys import Data
from mae.methods.base import Autoencoder


def save(model: Autoencoder, folder: Path, *, data: Data) -> list[Path]:
    """Writes encoder.pt2: images (B, C, H, W), pixels in [0, 1] -> `mean` and, where there is a class token, `cls`; returns it."""
    module, written = graph.Vectors(model.encoder, data).eval(), folder / "encoder.pt2"
    with torch.no_grad():
        program = torch.export.export(module, graph.example(model, data), dynamic_shapes=graph.any_number())
    torch.export.save(program, written)
    return [written]
