"""An encoder as an ONNX file, for runtimes without Python: pixels in, vectors out, any number of images at a time."""

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from mae.errors import ConfigError
from mae.keys import Data
from mae.methods.base import Autoencoder
from mae.nets import vit
from mae.nets.encoders import Encoder

NEEDED = ("onnx", "onnxscript")


class Vectors(nn.Module):
    """Images (B, C, H, W), pixels scaled to [0, 1] -> `mean` and, where the encoder has a class token, `cls`, each (B, D)."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, data: Data) -> None:
        super().__init__()
        self.encoder = encoder
        self.pools = ("mean",) if encoder.cls_token is None else ("mean", "cls")
        for name, values in (("mean", data.mean), ("std", data.std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """One (B, D) a pool."""
        tokens = self.encoder.forward_features((images - self.mean) / self.std)
        return tuple(vit.pool(self.encoder, tokens, pool) for pool in self.pools)


def save(model: Autoencoder, folder: Path, *, data: Data) -> list[Path]:
    """Writes encoder.onnx with the input `images` and the outputs `mean` and `cls`; returns it. The normalisation is inside.

    Raises ConfigError where the packages that write ONNX are not installed.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} not installed, which write ONNX: pip install {' '.join(NEEDED)}")
    module, written = Vectors(model.encoder, data).eval(), folder / "encoder.onnx"
    images = torch.zeros(2, data.channels, *model.encoder.patch_embed.img_size)  # two: one would be taken for a constant
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # the exporter is talkative
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (images,),
            written,
            dynamo=True,
            input_names=["images"],
            output_names=list(module.pools),
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            external_data=False,
        )
    return [written]
