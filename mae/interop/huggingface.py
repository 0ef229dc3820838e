"""Hugging Face's ViT and ViTMAE, read without transformers: the names of the hub's checkpoints and of its present classes.

Hub: `vit.encoder.layer.N.attention.attention.query` ...; what `state_dict()` of transformers 5 gives: `vit.layers.N.attention.q_proj` ...
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mae.errors import ConfigError
from mae.interop.files import looks_like
from mae.interop.official import patch_positions, with_class_position
from mae.keys import Data

if TYPE_CHECKING:  # what is written is asked of the model; what is read is told before timm is imported
    from mae.methods.base import Autoencoder

MODELS = ("vit_mae", "vit")  # `model_type` of config.json
HEADS = ("pooler.", "classifier.")  # no part of an encoder
# other spellings of the same -> the hub's
SPELLINGS = (
    (r"^vit\.", ""),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^layers\.", "encoder.layer."),
    (r"\.attention\.([qkv])_proj\.", lambda m: f".attention.attention.{dict(q='query', k='key', v='value')[m[1]]}."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)
TOP = {  # the hub's -> ours
    "embeddings.cls_token": "encoder.cls_token",
    "embeddings.position_embeddings": "encoder.pos_embed",
    "embeddings.patch_embeddings.projection": "encoder.patch_embed.proj",
    "layernorm": "encoder.norm",
    "decoder.mask_token": "decoder.mask_token",
    "decoder.decoder_embed": "decoder.embed",
    "decoder.decoder_norm": "decoder.norm",
    "decoder.decoder_pred": "decoder.pred",
}
STACKS = {"encoder.layer": "encoder.blocks", "decoder.decoder_layers": "decoder.blocks"}
BLOCK = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
QKV = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))


def is_one(state: Mapping[str, Any]) -> bool:
    """Whether a state dict has these names."""
    return any(key.endswith("embeddings.patch_embeddings.projection.weight") for key in state)


def to_ours(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Their names, in any of the spellings -> `encoder.*`, `decoder.*` and `decoder.positions`. Pooler and classifier are left out.

    Raises ConfigError for a name that ViT and ViTMAE do not have.
    """
    theirs = {_spelt(key): x for key, x in state.items()}
    ours = {}
    for key, x in theirs.items():
        if key.startswith(HEADS):
            continue
        if key == "decoder.decoder_pos_embed":
            ours["decoder.positions"] = patch_positions(x, what)
            continue
        stack = re.match(r"(encoder\.layer|decoder\.decoder_layers)\.(\d+)\.(.+?)(\.weight|\.bias)$", key)
        if stack and stack[3] in QKV:
            parts = [theirs.get(f"{stack[1]}.{stack[2]}.{name}{stack[4]}") for name in QKV]
            if len({part.shape if part is not None else None for part in parts}) > 1 or not x.dim():
                raise ConfigError(f"{what} has {key} without a query, key and value that fit each other: fetch it again")
            ours[f"{STACKS[stack[1]]}.{stack[2]}.attn.qkv{stack[4]}"] = torch.cat([part for part in parts if part is not None])
        elif stack and stack[3] in BLOCK:
            ours[f"{STACKS[stack[1]]}.{stack[2]}.{BLOCK[stack[3]]}{stack[4]}"] = x
        else:
            name, kind = _parts(r"(.+?)((?:\.weight|\.bias)?)", key)
            if name not in TOP:
                raise ConfigError(f"{what} is no ViT or ViTMAE as Hugging Face saves them: {looks_like({key: x})}")
            ours[TOP[name] + kind] = x
    return ours


def _parts(pattern: str, key: str) -> tuple[str, ...]:
    match = re.fullmatch(pattern, key)
    assert match is not None, key  # every key of these layouts is made so
    return match.groups()


def from_ours(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_ours`, in the hub's names: of a ViTMAEForPreTraining where there is a decoder, else of a ViTMAEModel."""
    prefix = "vit." if "decoder.positions" in ours else ""
    top = {name: theirs for theirs, name in TOP.items()}
    inside = {name: theirs for theirs, name in BLOCK.items()}
    found: dict[str, Tensor] = {}
    for key, x in ours.items():
        if key == "decoder.positions":
            found["decoder.decoder_pos_embed"] = with_class_position(x)
            continue
        name, kind = _parts(r"(.+?)((?:\.weight|\.bias)?)", key)
        before = prefix if key.startswith("encoder.") else ""
        if name in top:
            found[before + top[name] + kind] = x
            continue
        part, number, layer = _parts(r"(\w+)\.blocks\.(\d+)\.(.+)", name)
        block = f"{before}{'encoder.layer' if part == 'encoder' else 'decoder.decoder_layers'}.{number}"
        if layer == "attn.qkv":
            found |= {f"{block}.{name}{kind}": some.contiguous() for name, some in zip(QKV, x.chunk(3), strict=True)}
        else:
            found[f"{block}.{inside[layer]}{kind}"] = x
    return found


def read_config(config: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What config.json says that the weights do not: heads, image_size, and the arguments of assemble.autoencoder.

    Raises ConfigError for another model and for settings that this project's ViT does not have.
    """
    kind = config.get("model_type")
    if kind not in MODELS:
        raise ConfigError(f"{what} is a Hugging Face model of type {kind}: of those, vit_mae and vit can be read")
    if config.get("hidden_act", "gelu") != "gelu":
        raise ConfigError(f"{what} has the activation {config['hidden_act']}: only gelu can be read")
    size = config.get("image_size", 224)
    return {
        "heads": config.get("num_attention_heads", 12),
        "image_size": (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])),
        "decoder_heads": config.get("decoder_num_attention_heads", 16),
        "mask_ratio": config.get("mask_ratio", 0.75),
        "norm_pix": bool(config.get("norm_pix_loss", False)),
        "eps": config.get("layer_norm_eps", 1e-12),
    }


def save(model: "Autoencoder", folder: Path, *, data: Data) -> list[Path]:
    """Writes config.json, model.safetensors and preprocessor_config.json as `from_pretrained` opens them; returns them.

    A ViTMAEForPreTraining where the model is a MAE with its decoder, else a ViTMAEModel (which hides patches unless its mask_ratio is 0,
    as here). Raises ConfigError for an encoder that is more than a plain ViT, or whose images are no squares.
    """
    from mae.interop import assemble

    encoder = assemble.plain(model.encoder, "Hugging Face")
    height, width = encoder.patch_embed.img_size
    if height != width:
        raise ConfigError(f"the Hugging Face layout is for square images, not {height} x {width}: use --format timm or official")
    first: Any = encoder.blocks[0]  # timm's
    config = {
        "architectures": ["ViTMAEForPreTraining" if assemble.is_whole(model) else "ViTMAEModel"],
        "model_type": "vit_mae",
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": first.attn.num_heads,
        "intermediate_size": first.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": encoder.norm.eps,
        "qkv_bias": True,
        "image_size": height,
        "patch_size": encoder.patch_embed.patch_size[0],
        "num_channels": encoder.patch_embed.proj.in_channels,
        "mask_ratio": model.mask_ratio if assemble.is_whole(model) else 0.0,
        "dtype": "float32",
    }
    if assemble.is_whole(model):
        block: Any = model.decoder.blocks[0]
        config |= {
            "decoder_hidden_size": model.decoder.embed.out_features,
            "decoder_num_hidden_layers": len(model.decoder.blocks),
            "decoder_num_attention_heads": block.attn.num_heads,
            "decoder_intermediate_size": block.mlp.fc1.out_features,
            "norm_pix_loss": model.norm_pix,
        }
    images = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data.mean),
        "image_std": list(data.std),
    }
    written = [folder / name for name in ("config.json", "model.safetensors", "preprocessor_config.json")]
    for file, content in zip(written[::2], (config, images), strict=True):
        file.write_text(json.dumps(content, indent=2) + "\n")
    save_file(from_ours(assemble.tensors_of(model)), written[1], metadata={"format": "pt"})
    return written


def _spelt(key: str) -> str:
    for pattern, hub in SPELLINGS:
        key = re.sub(pattern, hub, key)
    return key
