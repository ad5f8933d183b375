"""What operators over caches and pages have alike: no gradient, and no rule for vmap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops.autograd import wants_gradient

__all__ = ["forward_only", "refuse_gradients"]


def refuse_gradients(*tensors: Any) -> None:
    """Raise UnsupportedProblem where a gradient would be asked for; what is no tensor is not looked at."""
    if torch.is_grad_enabled() and wants_gradient(*(x for x in tensors if isinstance(x, Tensor))):
        raise UnsupportedProblem(
            "attention over a cache has no gradient, and an input requires one: call it under torch.no_grad(), or "
            "flash_attn_func of the keys for training"
        )


def forward_only(
    name: str, kernels: Mapping[str, Callable[..., Any]], without_vmap: str
) -> Mapping[str, Callable[..., Any]]:
    """The kernels of `fa2gen::name`, and refusals of gradients and of torch.func.vmap, with what to do without it."""
    operator = getattr(torch.ops.fa2gen, name).default

    def autograd(keyset: Any, *arguments: Any, **named: Any) -> Any:
        lists = (x for x in (*arguments, *named.values()) if isinstance(x, list | tuple))
        refuse_gradients(*arguments, *named.values(), *(x for of in lists for x in of))
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **named)

    def vmap(*_: Any) -> NoReturn:
        raise UnsupportedProblem(f"torch.func.vmap over {without_vmap}")

    return {**kernels, "Autograd": autograd, "vmap": vmap}
