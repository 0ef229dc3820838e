"""What an encoder makes of every image, computed in one pass over the images and kept on disk under a hash of all that decides it."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm import tqdm

from mae.config import Config
from mae.data.loader import evaluation_batches, normalise
from mae.data.sources import Source, Splits, Subset
from mae.errors import ConfigError
from mae.evaluation.material import Features, Material
from mae.methods.base import Autoencoder
from mae.nets import vit
from mae.nets.precision import DTYPES, computing

VERSION = 2  # of the features: one more whenever they would come out otherwise
PATIENCE_SECONDS = 3  # with a terminal that says nothing
LAYERS, TOKENS = "layers", "tokens"  # what a pass over the images can keep beside the pools


class Share(NamedTuple):
    """This process's part of the images, where several processes read them together."""

    rank: int
    world: int
    join: Callable[[Tensor], Tensor]  # rows of this process -> the rows of all processes, in the order of their ranks

    def all(self, flag: bool) -> bool:
        """Whether the flag is set in every process."""
        return bool(self.join(torch.tensor([flag])).all())


ALONE = Share(0, 1, lambda rows: rows)


def extract(
    model: Autoencoder,
    source: Source,
    config: Config,
    *,
    device: torch.device | str,
    pools: tuple[str, ...] | None = None,
    also: tuple[str, ...] = (),
    precision: str = "fp32",
    cache: Path | None = None,
    share: Share = ALONE,
) -> dict[str, Features]:
    """The features of every image of a source in its order, on the CPU, one Features (N, D) a pool (default: all that the encoder has).
    Several processes (`share`) each read a part of the images, and all are given the whole.

    `also` may ask for LAYERS (those of every block, by layer_name) and TOKENS (the patch tokens, (N, P, D) in half precision), which
    come from the same pass. Nothing is augmented, hidden or remembered for gradients, and the model is left in the modes it was in. In
    the folder `cache` all but tokens are kept as HASH.safetensors, and read instead of computed when nothing that decides them has
    changed. Raises ConfigError for a pool that the encoder does not have.
    """
    if precision not in DTYPES:
        raise ConfigError(f"precision {precision!r} is unknown: choose one of {', '.join(DTYPES)}")
    pools = pools or pools_of(model)
    who = encoder_hash(model)

    def file_of(*more: str) -> Path | None:
        key = digest(VERSION, who, source.fingerprint, transform_of(config), pools, *more, precision)
        return cache / f"{key}.safetensors" if cache is not None and TOKENS not in more else None

    file = file_of(*also)
    if file is not None and share.all(file.exists()):
        kept = load_file(file)
        return {name: Features(x, kept["labels"]) for name, x in kept.items() if name != "labels"}

    device = torch.device(device)
    with evaluating(model), computing(precision, device):
        part = source
        if share.world > 1:
            bounds = [len(source) * r // share.world for r in (share.rank, share.rank + 1)]
            part = Subset(source, np.arange(*bounds))
        features = pass_over(part, config, lambda images: encode_all(model, images, pools, also), device=device, quiet=share.rank > 0)
    features = {name: Features(share.join(f.x), share.join(f.y)) for name, f in features.items()}
    for file, names in {file_of(): pools, file_of(*also): tuple(features)}.items():  # the pools alone too: others ask for no more
        if file is not None and share.rank == 0:
            tensors = {name: features[name].x for name in names} | {"labels": features[pools[0]].y}
            write_atomically(file, partial(save_file, tensors))
    return features


def gather(features_of: Callable[[Source], dict[str, Features]], splits: Splits) -> Material:
    """The material of the evaluators, from a function that turns a source into features. Needs a test split."""
    train, test = features_of(splits.train), features_of(splits.test_images)
    empty = {pool: f.rows(slice(0)) for pool, f in train.items()}
    validation = features_of(splits.validation) if len(splits.validation) else empty
    return Material(train, validation, test, _positions(splits), splits.train.classes)


def _positions(splits: Splits) -> Tensor:
    """(N_train + N_validation,): the order in the source, which a validation carved from the training images has interrupted."""
    train, validation = splits.train, splits.validation
    if isinstance(train, Subset) and isinstance(validation, Subset) and train.source is validation.source:
        return torch.from_numpy(np.concatenate([train.positions, validation.positions]))
    return torch.arange(len(train) + len(validation))


def pass_over(
    source: Source,
    config: Config,
    encode: Callable[[Tensor], dict[str, Tensor]],
    *,
    device: torch.device,
    batch_size: int = 256,
    quiet: bool = False,
) -> dict[str, Features]:
    """Applies `encode`, normalised images (B, C, H, W) -> {pool: (B, D)}, to every image of a source once, in order, without gradients.

    What takes longer than some seconds shows on a terminal how much is left, unless it is to be `quiet`.
    """
    vectors: dict[str, list[Tensor]] = {}
    labels = []
    with torch.no_grad():
        batches = evaluation_batches(source, config, batch_size=batch_size, device=device)
        count = -(-len(source) // batch_size)
        for batch in tqdm(batches, "encoding", count, unit="batch", leave=False, delay=PATIENCE_SECONDS, disable=quiet or None):
            for pool, x in encode(normalise(batch.images, config.data)).items():
                vectors.setdefault(pool, []).append((x if x.dtype == torch.half else x.float()).cpu())
            labels.append(batch.labels.cpu())
    return {pool: Features(torch.cat(parts), torch.cat(labels)) for pool, parts in vectors.items()}


def pools_of(model: Autoencoder) -> tuple[str, ...]:
    """The pools that evaluators read: mean-pooled patches, the class token where there is one, and the method's code where it has one."""
    if encodes_itself(model):
        return ("mean",)
    cls = ("cls",) if model.encoder.cls_token is not None else ()
    return ("mean", *cls, *(("latent",) if hasattr(model, "code") else ()))


def encode_all(model: Autoencoder, images: Tensor, pools: tuple[str, ...], also: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Normalised images (B, C, H, W) -> (B, D) a pool, and what else is asked for, in one run of the encoder."""
    if encodes_itself(model):
        return {pool: model.encode(images, pool) for pool in pools}
    encoder = model.encoder
    found: dict[str, Tensor] = {}
    if LAYERS in also:
        assert isinstance(encoder, VisionTransformer)  # nobody asks others
        blocks = vit.block_tokens(encoder, images, range(1, len(encoder.blocks) + 1))
        ways = [pool for pool in pools if pool != "latent"]
        found = {layer_name(n, pool): vit.pool(encoder, x, pool) for n, x in enumerate(blocks, start=1) for pool in ways}
        tokens = blocks[-1]
    else:
        tokens = encoder.forward_features(images)  # (B, P + N, D)
    if TOKENS in also:
        found[TOKENS] = tokens[:, encoder.num_prefix_tokens :].half()
    return {pool: model.pooled(tokens, pool) for pool in pools} | found


def layer_name(layer: int, pool: str) -> str:
    """'layer3' for the mean over patches after three blocks, 'layer3_cls' for the class token."""
    return f"layer{layer}" if pool == "mean" else f"layer{layer}_{pool}"


def encodes_itself(model: Autoencoder) -> bool:
    """Whether the features are made otherwise than by the encoder alone (raw pixels, principal components)."""
    return type(model).encode is not Autoencoder.encode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module back in the mode it was in (a frozen part may differ from the rest)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def encoder_hash(model: Autoencoder) -> str:
    """16 hex digits of the architecture and weights that decide the features."""
    module = model if encodes_itself(model) or hasattr(model, "code") else model.encoder
    heads = [getattr(child, "num_heads", None) for child in module.modules()]  # not to be seen in the weights, nor in repr
    state = hashlib.sha256(f"{module!r} {heads}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()[:16]


def transform_of(config: Config) -> dict[str, Any]:
    """What is done to an image before an encoder sees it, when evaluating."""
    d = config.data
    return {"image_size": config.image_size, "channels": d.channels, "mean": list(d.mean), "std": list(d.std), "resize": d.resize}


def digest(*parts: Any) -> str:
    """16 hex digits of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Makes the folder, lets `write` fill a temporary file beside the target, and renames it: a reader sees all of it or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        write(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
