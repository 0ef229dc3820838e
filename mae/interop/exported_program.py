"""An encoder as a program that torch.export.load opens wherever torch is, without timm and without this project."""

from pathlib import Path

import torch
from torch import Tensor, nn

from mae.interop import graph
from mae.keys import Data
from mae.methods.base import Autoencoder


def save(model: Autoencoder, folder: Path, *, data: Data) -> list[Path]:
    """Writes encoder.pt2: images (B, C, H, W), pixels in [0, 1] -> `mean` and, where there is a class token, `cls`; returns what it wrote.

    Of an autoencoder that makes latents for diffusion also latents_encoder.pt2: such images -> maps (B, c, h, w) of unit variance, and
    latents_decoder.pt2: such maps -> images.
    """
    images = graph.example(model, data)
    written = [_write(graph.Vectors(model.encoder, data), "images", images, folder / "encoder.pt2")]
    if makes_latents(model):
        encoder, decoder = graph.ToLatents(model, data).eval(), graph.ToImages(model, data)
        with torch.no_grad():
            latents = encoder(*images)
        written.append(_write(encoder, "images", images, folder / "latents_encoder.pt2"))
        written.append(_write(decoder, "latents", (latents,), folder / "latents_decoder.pt2"))
    return written


def makes_latents(model: Autoencoder) -> bool:
    """Whether its code is a map at a scale of its own, as diffusion models take it."""
    return hasattr(model, "latents_for_diffusion")


def _write(module: nn.Module, argument: str, example: tuple[Tensor], file: Path) -> Path:
    with torch.no_grad():
        program = torch.export.export(module.eval(), example, dynamic_shapes=graph.any_number(argument))
    torch.export.save(program, file)
    return file
