"""The arithmetic of images and patches; free of torch, so that a wrong size is refused at once."""

import math
import re

from mae.errors import ConfigError


def patch_size(encoder_name: str, override: int | None) -> int:
    """The patch size in pixels: the override, or what the timm name says, or 16."""
    named = re.search(r"patch(\d+)", encoder_name)
    return override or (int(named[1]) if named else 16)


def grid(image_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """(rows, columns) of patches. Raises ConfigError where a side is no multiple of the patch."""
    for side in image_size:
        if side % patch or side < patch:
            nearest = max(round(side / patch), 1) * patch
            raise ConfigError(f"data.image_size {side} is not a multiple of encoder.patch_size {patch}: try {nearest}")
    return image_size[0] // patch, image_size[1] // patch


def hidden_count(patches: int, mask_ratio: float) -> int:
    """How many of the patches are hidden: all but int(patches * (1 - mask_ratio)). Raises ConfigError for none or all."""
    if patches < 2:
        raise ConfigError("an image of a single patch has nothing to hide: choose a smaller encoder.patch_size or a larger data.image_size")
    hidden = patches - int(patches * (1 - mask_ratio))
    if not 0 < hidden < patches:
        what = "all" if hidden >= patches else "none"
        low, high = math.ceil(1000 / patches) / 1000, math.floor(1000 - 1000 / patches) / 1000
        raise ConfigError(f"method.mask_ratio {mask_ratio} hides {what} of the {patches} patches: choose one from {low} to {high}")
    return hidden


def code(size: int, values: int, width: int | None, kind: str) -> None:
    """Raises ConfigError for a code of `size` numbers, no fewer than the image (`kind` global) or the patch (token) has that it stands for.

    `values` are theirs; `width` is that of the token which the code is read from, None where it is not known yet.
    """
    widest = values - 1 if width is None else min(values - 1, width)
    if 0 < size <= widest:
        return
    whole = "an image" if kind == "global" else "a patch"
    facts = f"{whole} has {values} values" + ("" if width is None else f" and the encoder is {width} wide")
    way_out = f"choose one from 1 to {widest}" if widest else "raise encoder.patch_size"
    raise ConfigError(f"method.bottleneck_size {size} is no bottleneck where {facts}: {way_out}")
