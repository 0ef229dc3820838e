"""The story of export: an encoder, or a whole MAE, in the layout that other programs open."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae.commands import door, encoders, options
from mae.commands.whole import whole_or_not
from mae.errors import ConfigError
from mae.keys import Data

USAGE = """
usage: mae export ENCODER --format timm|hf|official|onnx|torch --out DIR

Writes the folder DIR from a run, or from any other encoder (a checkpoint file, timm:NAME, hf:NAME):
  timm      config.json and model.safetensors: timm.create_model("local-dir:DIR", pretrained=True)
  hf        the same names in Hugging Face's layout: transformers.ViTMAEForPreTraining.from_pretrained("DIR"), or ViTMAEModel where
            there is no decoder
  official  encoder.pth and, of a MAE, full.pth with its decoder, in the layout of the MAE authors' checkpoints
  onnx      encoder.onnx: images (B, C, H, W), pixels in [0, 1], in; vectors `mean` and `cls` out, each (B, D)
  torch     encoder.pt2, the same for torch.export.load, which needs neither timm nor this project; of a kl_ae also latents_encoder.pt2,
            pixels in, maps (B, c, h, w) of unit variance out, and latents_decoder.pt2, such maps in, pixels out
and README.md, a model card with what was measured. The weights are those of the run's newest checkpoint, in float32; `mae evaluate DIR ...`
reads them back (timm, hf, official).

  --format NAME   choice: timm | hf | official | onnx | torch
  --out DIR       folder, a new one
"""
FORMATS = ("timm", "hf", "official", "onnx", "torch")
# (format, whether the decoder is there) -> the library that opens it, and how
OPENING = {
    ("timm", False): ("timm", 'import timm\n\nencoder = timm.create_model("local-dir:DIR", pretrained=True).eval()'),
    ("hf", False): (
        "transformers",
        'from transformers import ViTMAEModel\n\nencoder = ViTMAEModel.from_pretrained("DIR")  # hides nothing, but shuffles the patches',
    ),
    ("hf", True): ("transformers", 'from transformers import ViTMAEForPreTraining\n\nmodel = ViTMAEForPreTraining.from_pretrained("DIR")'),
    ("official", False): ("pytorch", 'import torch\n\nweights = torch.load("encoder.pth", weights_only=True)["model"]'),
    ("official", True): ("pytorch", 'import torch\n\nweights = torch.load("full.pth", weights_only=True)["model"]'),
    ("onnx", False): (
        "onnx",
        'import onnxruntime\n\nencoder = onnxruntime.InferenceSession("encoder.onnx")\n(mean,) = encoder.run(["mean"], {"images": pixels})',
    ),
    ("torch", False): (
        "pytorch",
        'import torch\n\nencoder = torch.export.load("encoder.pt2").module()\nmean, *cls = encoder(pixels)',
    ),
}
LATENTS = """
to_latents, to_images = (torch.export.load(f"latents_{half}.pt2").module() for half in ("encoder", "decoder"))
pixels = to_images(to_latents(pixels))  # a diffusion model works between the two, on maps (B, c, h, w) of unit variance"""


def main(words: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return door.enter(_story, USAGE, words, keys=())


def _story(words: list[str]) -> None:
    given, words = options.take(words, "format", "out")
    if given["format"] not in FORMATS:
        raise ConfigError(f"--format {given['format']} is unknown: choose one of {', '.join(FORMATS)}")
    word, others = encoders.one_encoder(words)
    if others:
        raise ConfigError(f"{others[0]} cannot be changed here, where the encoder decides: give ENCODER, --format and --out")
    target = Path(given["out"]).expanduser()
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists already: choose another folder for the export, or remove it")
    found = encoders.find(word)
    model, data = found.load(), Data(**found.base["data"])
    entries = json.loads(found.home.results.read_text()) if found.home.results.is_file() else []

    from timm.models.vision_transformer import VisionTransformer

    from mae.interop import assemble, exported_program, huggingface, official, onnx_file, timm_folder
    from mae.reporting import card

    with whole_or_not(target) as folder:
        if given["format"] == "timm":
            if not isinstance(model.encoder, VisionTransformer):
                raise ConfigError(f"timm has no {type(model.encoder).__name__}: only a run with a ViT can be exported")
            timm_folder.save(model.encoder, folder, data=data, tag=found.name)
        else:
            writers = {"hf": huggingface, "official": official, "onnx": onnx_file, "torch": exported_program}
            writers[given["format"]].save(model, folder, data=data)
        whole = given["format"] in ("hf", "official") and assemble.is_whole(model)
        library, opening = OPENING[given["format"], whole]
        if given["format"] == "torch" and exported_program.makes_latents(model):
            opening += LATENTS
        facts = _facts(model, data, found.base)
        (folder / "README.md").write_text(card.text(found.name, library=library, opening=opening, facts=facts, entries=entries))
    for file in sorted(target.iterdir()):
        print(f"{file}  {file.stat().st_size / 1e6:.1f} MB")


def _facts(model: Any, data: Data, base: Mapping[str, Any]) -> dict[str, str]:
    """What a reader of the card wants to know first."""
    encoder = model.encoder
    height, width = encoder.patch_embed.img_size
    return {
        "architecture": f"{base['encoder']['name']}: {len(encoder.blocks)} blocks, {encoder.embed_dim} wide",
        "parameters": f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M (encoder)",
        "images": f"{height} x {width} pixels, {data.channels} channels, mean {list(data.mean)}, std {list(data.std)}",
        "trained by": f"{base['method']['name']}, on {base['data']['name']}" if "name" in base["data"] else "not this project",
    }
