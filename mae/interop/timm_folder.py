"""An encoder or a classifier as timm's local-dir: folder, config.json and model.safetensors: timm.create_model opens it."""

from collections.abc import Sequence
from pathlib import Path

import timm.models
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from mae.keys import Data


def save(encoder: VisionTransformer, folder: Path, *, data: Data, tag: str, classes: Sequence[str] = ()) -> None:
    """Writes the encoder so that `timm.create_model("local-dir:FOLDER", pretrained=True)` reproduces it.

    Mean, standard deviation and input size are those it was trained with; `tag` names the training. `classes` are the names of what a
    classifier tells apart, in the order of its outputs.
    """
    height, width = encoder.patch_embed.img_size
    preprocessing = {
        "input_size": (encoder.patch_embed.proj.in_channels, height, width),
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "crop_pct": 1 / data.resize,
        "interpolation": "bicubic",
    }
    overlay = {"tag": tag, **preprocessing, "num_classes": len(classes), "license": None, "hf_hub_id": None, "url": None}
    timm.models.save_for_hf(
        encoder,
        str(folder),
        model_config={"pretrained_cfg": overlay, **({"label_names": list(classes)} if classes else {})},
        # an encoder that was fine-tuned on its mean has its last norm after it, whatever it was built with
        model_args={"fc_norm": True} if isinstance(encoder.norm, nn.Identity) else None,
        data_config=preprocessing,
        safe_serialization=True,
    )
