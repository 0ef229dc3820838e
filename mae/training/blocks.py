"""What is done to a module block by block: activations made anew in the backward pass, and compiled code.

Recomputation: Chen et al., arXiv:1604.06174; of some operations only: Korthikanti et al., arXiv:2205.05198, section 5, with another choice:
all that is cheap, where they repeat attention, whose maps fused kernels do not keep.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mae.errors import ConfigError
from mae.nets import products

COSTLY = {  # what selective recomputation keeps the results of
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # see mae.nets.products
    COSTLY.add(torch.ops.mkldnn._linear_pointwise.default)


def of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a module's encoders and decoders: what stands in their `blocks`, in order, where it has parameters."""
    stacks = [getattr(child, "blocks", None) for child in module.modules()]
    found = [block for stack in stacks if isinstance(stack, nn.Sequential | nn.ModuleList) for block in stack]
    return [block for block in found if next(block.parameters(), None) is not None]


def recompute(module: nn.Module, how: bool | str) -> None:
    """From now on each block makes its activations anew in the backward pass, as train.recompute says; the names of weights stay.

    False: none. True: a block keeps its input alone. selective: also what comes out of matrix products and attention, so that only cheap
    operations are repeated (norms, the activation, sums, casts). Raises ConfigError for a module that differentiates itself in its
    forward pass.
    """
    if not how:
        return
    selective = how == "selective"
    if getattr(module, "differentiates", False):
        raise ConfigError("this method differentiates twice, for which activations must be kept: set train.recompute=false")
    if selective:  # torch warns of values that are kept and then overwritten, which no block does
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_no_warning)
    for block in of(module):
        block.forward = functools.partial(_twice, block.forward, selective)


def _no_warning(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _twice(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.compiler.is_compiling():
        contexts = _selective_and_wide if selective else products.again
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    if selective:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=_selective, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)  # the compiler takes no other contexts, and needs none


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


_selective = functools.partial(create_selective_checkpoint_contexts, _policy)


def _selective_and_wide() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    (first, again), (first_wide, again_wide) = _selective(), products.again()
    return _both(first, first_wide), _both(again, again_wide)


@contextlib.contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


def compile_parts(module: nn.Module, *, by_block: bool) -> None:
    """torch.compile, in place: of the whole module, or of its blocks, whose code is alike and therefore made once.

    Blocks take a quarter of the time (ViT-L on a GPU: 23 s instead of 87), for 6% more kernels a step.
    """
    alike = of(module) if by_block else []
    for part in alike or [module]:
        part.compile()
    limit = torch._dynamo.config.recompile_limit  # blocks that differ in a number, as their drop paths do, are made one by one
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(alike))
