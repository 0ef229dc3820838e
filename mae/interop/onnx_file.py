"""An encoder as an ONNX file, for runtimes without Python: pixels in, vectors out, any number of images at a time."""

import contextlib
import importlib.util
import io
import warnings
from pathlib import Path

import torch

from mae.errors import ConfigError
from mae.interop import graph
from mae.keys import Data
from mae.methods.base import Autoencoder

NEEDED = ("onnx", "onnxscript")


def save(model: Autoencoder, folder: Path, *, data: Data) -> list[Path]:
    """Writes encoder.onnx with the input `images` and the outputs `mean` and `cls`; returns it. The normalisation is inside.

    Raises ConfigError where the packages that write ONNX are not installed.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)} not installed, which write ONNX: pip install {' '.join(NEEDED)}")
    module, written = graph.Vectors(model.encoder, data).eval(), folder / "encoder.onnx"
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():  # the exporter is talkative
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            graph.example(model, data),
            written,
            dynamo=True,
            input_names=["images"],
            output_names=list(module.pools),
            dynamic_shapes=graph.any_number(),
            external_data=False,
        )
    return [written]
