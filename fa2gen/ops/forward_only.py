"""What operators over caches and pages have alike: no gradient, and no rule for vmap.

Inputs may require one, as weights outside torch.no_grad() do, and results are what they are without: the error comes to
who goes backward through them, as with a step that autograd has no formula of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from fa2gen.errors import UnsupportedProblem
from fa2gen.ops.autograd import is_plain, wants_gradient

__all__ = ["forward_only", "is_direct"]


def is_direct(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> bool:
    """Whether a call may go past its operator: nothing but a kernel would see it (`is_plain`), nor is a gradient asked
    for."""
    if not is_plain(q, k, v) or not all(x is None or type(x) is Tensor for x in others):
        return False
    return not (torch.is_grad_enabled() and wants_gradient(q, k, v, *(x for x in others if x is not None)))


def _refuse(*_: Any) -> NoReturn:
    raise UnsupportedProblem(
        "attention over a cache has no gradient, and a backward pass asks for one: call it under torch.no_grad(), or "
        "flash_attn_func of the keys for training"
    )


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, run: Callable[[], Any], *__: Tensor) -> Any:
        return run()

    backward = staticmethod(_refuse)


def forward_only(
    name: str, kernels: Mapping[str, Callable[..., Any]], without_vmap: str
) -> Mapping[str, Callable[..., Any]]:
    """The kernels of `fa2gen::name`, results without a gradient, and no torch.func.vmap, with what to do without it."""
    operator = getattr(torch.ops.fa2gen, name).default

    def autograd(keyset: Any, *arguments: Any, **named: Any) -> Any:
        lists = (x for x in (*arguments, *named.values()) if isinstance(x, list | tuple))
        tensors = [x for x in (*arguments, *named.values(), *(x for of in lists for x in of)) if isinstance(x, Tensor)]

        def run() -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments, **named)

        if not (torch.is_grad_enabled() and wants_gradient(*tensors)):
            return run()
        if torch._C._are_functorch_transforms_active():  # torch.func.grad and others, which go backward in any case
            _refuse()
        return _ForwardOnly.apply(run, *tensors)

    def vmap(*_: Any) -> NoReturn:
        raise UnsupportedProblem(f"torch.func.vmap over {without_vmap}")

    return {**kernels, "Autograd": autograd, "vmap": vmap}
