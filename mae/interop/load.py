"""Any encoder that is no run of this project: what it is, and the model of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import Tensor

from mae.errors import ConfigError
from mae.interop import architecture, arguments, files, first_look, hub, huggingface, official
from mae.keys import Data

if TYPE_CHECKING:  # what is wrong with a file is said before timm is imported, which takes seconds
    from timm.models.vision_transformer import VisionTransformer

    from mae.methods.base import Autoencoder

MEAN, STD = tuple(Data().mean), tuple(Data().std)  # ImageNet's
HALF = (0.5, 0.5, 0.5)  # Hugging Face's for a plain ViT
MARGIN = 1.143  # ImageNet's: 224 pixels out of 256
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class Opened(NamedTuple):
    """An encoder from elsewhere, and how images have to be given to it."""

    model: "Autoencoder"  # in eval mode, on the CPU; a mae.methods.mae.MAE where the decoder's weights came with it
    name: str  # for people
    architecture: str  # timm's name
    overrides: dict[str, Any]  # what differs from that, as keys of the `encoder` section
    image_size: tuple[int, int]  # pixels, (height, width)
    channels: int
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    resize: float  # the shorter side before the centre crop, in image sizes
    kind: str  # timm | official | hf


def open_encoder(word: str) -> Opened:
    """What ENCODER means on the command line where it is no run folder.

    `timm:NAME` (timm's pretrained weights), `hf:NAME` (Hugging Face ViT or ViTMAE, a folder or a name on the hub), a folder as timm or
    Hugging Face saves it, or a file: .safetensors, .pth, .pt, .bin with the weights of timm, of the MAE authors (encoder, whole model,
    fine-tuned) or of Hugging Face. Raises ConfigError, one sentence, for anything else.
    """
    first_look.check(word)
    source, _, name = word.partition(":")
    if source == "timm":
        from mae.interop import timm_models

        return _of_timm(timm_models.by_name(name), name, {})
    if source == "hf":
        return _of_folder(Path(name)) if Path(name).is_dir() else _of_hub(name)
    path = Path(word).expanduser()
    return _of_folder(path) if path.is_dir() else _of_file(path)


def _of_timm(encoder: "VisionTransformer", name: str, overrides: dict[str, Any]) -> Opened:
    from mae.methods.base import Autoencoder

    facts = cast(dict[str, Any], encoder.pretrained_cfg)  # timm's, set when it makes a model
    size, channels = encoder.patch_embed.img_size or facts["input_size"][1:], encoder.patch_embed.proj.in_channels
    mean, std = (_a_channel(facts[key], channels) for key in ("mean", "std"))
    model, resize = Autoencoder(encoder).eval(), max(1 / facts["crop_pct"], 1.0)
    return Opened(model, name, facts["architecture"], overrides, tuple(size), channels, mean, std, resize, "timm")


def _of_folder(folder: Path) -> Opened:
    config = files.read_json(folder / "config.json")
    if "architecture" in config:
        from mae.interop import timm_models

        tag = (config.get("pretrained_cfg") or {}).get("tag")
        return _of_timm(timm_models.folder(folder), tag or folder.resolve().name, timm_models.overrides(folder))
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ConfigError(f"{folder} has a config.json but no model.safetensors: give the folder that holds the weights too")
    return _of_hugging_face(config, weights, folder / "preprocessor_config.json", folder.resolve().name)


def _of_hub(name: str) -> Opened:
    file = hub.fetch(name, "config.json")
    config = files.read_json(file)
    if "architecture" in config:  # a timm model on the hub
        return _of_folder(hub.fetch(name, WEIGHTS[0]).parent)
    huggingface.read_config(config, f"hf:{name}")  # refused before its weights are fetched
    weights = hub.find(name, "model.safetensors") or hub.fetch(name, "pytorch_model.bin")
    return _of_hugging_face(config, weights, hub.find(name, "preprocessor_config.json"), name.split("/")[-1])


def _of_hugging_face(config: Mapping[str, Any], weights: Path, preprocessing: Path | None, name: str) -> Opened:
    known = huggingface.read_config(config, str(weights))
    images = files.read_json(preprocessing) if preprocessing is not None and preprocessing.is_file() else {}
    mae = config["model_type"] == "vit_mae"
    mean, std = (images.get(f"image_{key}", value if mae else HALF) for key, value in (("mean", MEAN), ("std", STD)))
    size = images.get("size")
    if isinstance(size, int) or (isinstance(size, dict) and "height" in size):  # the model's, to which all is scaled, with nothing cut off
        known["resize"] = 1.0
    return _of_weights(huggingface.to_ours(files.read(weights).tensors, str(weights)), str(weights), name, "hf", mean, std, **known)


def _of_file(file: Path) -> Opened:
    if file.name in WEIGHTS and (file.parent / "config.json").is_file():  # which says what the weights do not
        return _of_folder(file.parent)
    tensors, facts = files.read(file)
    if huggingface.is_one(tensors):
        return _of_weights(huggingface.to_ours(tensors, str(file)), str(file), file.stem, "hf", MEAN, STD)
    kind = "official" if official.is_one(tensors) else "timm"
    return _of_weights(
        official.to_ours(tensors, str(file)), str(file), file.stem, kind, **{"mean": MEAN, "std": STD, **arguments.said(facts)}
    )


def _of_weights(
    ours: Mapping[str, Tensor],
    what: str,
    name: str,
    kind: str,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    resize: float = MARGIN,
    **others: Any,
) -> Opened:
    encoder = {key.removeprefix("encoder."): x for key, x in ours.items() if key.startswith("encoder.")}
    found = architecture.infer(encoder, what=what, heads=heads, image_size=image_size)
    from mae.interop import assemble

    model = assemble.autoencoder(ours, found, what=what, **others)
    mean, std = (_a_channel(x, found.channels) for x in (mean, std))
    return Opened(model, name, found.name, found.overrides, found.image_size, found.channels, mean, std, resize, kind)


def _a_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """The values where there is one a channel, else their mean for each."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels
