"""What every block of an encoder makes of the images."""

from collections.abc import Iterator, Sequence
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae.data.sources import Source
from mae.errors import ConfigError
from mae.evaluation.features import LAYERS, encodes_itself, gather, layer_name, pass_over
from mae.evaluation.material import Features, Material
from mae.evaluation.subject import Subject
from mae.nets import vit

KEEP_BYTES = 8 * 2**30  # of features at once


def depth_of(subject: Subject) -> int:
    """How many blocks the subject's encoder has. Raises ConfigError where they cannot be looked at one by one."""
    return len(_encoder_of(subject).blocks)


def _encoder_of(subject: Subject) -> VisionTransformer:
    encoder = subject.model.encoder
    if encodes_itself(subject.model) or not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"{type(encoder).__name__} has no blocks to look at one by one: take an encoder that is a timm vit_*")
    return encoder


def pools_of(subject: Subject) -> tuple[str, ...]:
    """How tokens become one vector: their mean, and the class token where there is one."""
    return ("mean", "cls") if subject.model.encoder.cls_token is not None else ("mean",)


def features(subject: Subject, source: Source, which: Sequence[int], pools: tuple[str, ...]) -> dict[str, Features]:
    """Features (N, D) after some blocks, counted from 1, by layer_name(layer, pool); behind the encoder's final norm, so that those of the
    last block are the encoder's own.
    """
    known = subject.known(source, LAYERS)
    if known is not None:
        return {name: known[name] for layer in which for name in [layer_name(layer, pool) for pool in pools]}
    encoder = _encoder_of(subject)

    def encode(images: Tensor) -> dict[str, Tensor]:
        tokens = dict(zip(which, vit.block_tokens(encoder, images, which), strict=True))
        return {layer_name(layer, pool): vit.pool(encoder, answer, pool) for layer, answer in tokens.items() for pool in pools}

    with subject.reading():
        return pass_over(source, subject.config, encode, device=subject.device)


def materials(subject: Subject) -> Iterator[tuple[Sequence[int], Material]]:
    """The features of all three splits as pools of a material on the subject's device, and the layers that are in it: all of them in one
    pass over the images where they fit into KEEP_BYTES, else as many a pass as do. Raises ConfigError as depth_of.
    """
    layers, pools = range(1, depth_of(subject) + 1), pools_of(subject)
    if LAYERS in subject.also:  # they come with the pass that the other protocols need
        names = [layer_name(layer, pool) for layer in layers for pool in pools]
        yield layers, gather(lambda source: {name: subject.read(source)[name] for name in names}, subject.splits).to(subject.device)
        return
    size = 4 * subject.model.encoder.embed_dim * len(pools) * sum(len(split) for split in subject.splits if split is not None)
    step = min(max(1, KEEP_BYTES // size), len(layers))
    for some in (layers[start : start + step] for start in range(0, len(layers), step)):
        yield some, gather(partial(features, subject, which=some, pools=pools), subject.splits).to(subject.device)
