"""Who is measured: every contestant behind one callable, and the reason for each that is missing.

A contestant's `prepare(point, q, k, v)` gives a callable without arguments that computes attention forward, from
tensors (batch, seqlen, heads, head_dim), and returns the output in the same layout. Layout changes are views, made
beforehand.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from fa2gen.arch import ARCHES
from fa2gen.bench.points import Point
from fa2gen.errors import InvalidInput

__all__ = ["DEFAULT", "NAMES", "OURS", "Contestant", "Missing", "find", "in_order", "is_ours"]

OURS = tuple(f"fa2gen-{arch}" for arch in reversed(ARCHES))
DEFAULT = (*OURS, "cudnn", "fa2", "fa3", "fa4")
"""`math` and `flex` only when asked for: one keeps the S x S matrix in memory, the other compiles at each point."""

Prepare = Callable[[Point, Any, Any, Any], Callable[[], Any]]


class Missing(Exception):
    """A contestant that cannot take part here; the message says why, and what would change that."""


@dataclass(frozen=True)
class Contestant:
    """`context` is entered around calls: which backend torch may pick."""

    name: str
    prepare: Prepare
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


def is_ours(name: str) -> bool:
    return name.startswith("fa2gen-")


def find(names: Sequence[str], fa3_library: Path | None = None) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants of those names that can run on the current device, and why the others can not.

    fa3_library  a file that registers the operators `flash_attn_3::fwd`; else an installed package is looked for.

    Raises InvalidInput for an unknown name.
    """
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for name in dict.fromkeys(names):
        if name not in NAMES:
            raise InvalidInput(f"no contestant {name!r}; there are {', '.join(NAMES)}")
        try:
            found.append(_FACTORIES[name](fa3_library))
        except Missing as error:
            missing[name] = str(error)
    return found, missing


# Ours ----------------------------------------------------------------------------------------------------------------


def _fa2gen(arch: str, _: Path | None) -> Contestant:
    """The public function; where the device's own family is meant, without any option, as a user calls it."""
    torch = import_module("torch")
    from fa2gen.ops import attention, flash_attn_func

    capability = torch.cuda.get_device_capability()
    if arch == "sm90" and capability != (9, 0):
        raise Missing(f"its kernels run on compute capability 9.0, this GPU has {capability[0]}.{capability[1]}")
    native = "sm90" if capability == (9, 0) else "sm80"

    def prepare(point: Point, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        if arch == native:
            return lambda: flash_attn_func(q, k, v, causal=point.causal)
        return lambda: attention(q, k, v, causal=point.causal, arch=arch)[0]

    return Contestant(f"fa2gen-{arch}", prepare)


# Peers ---------------------------------------------------------------------------------------------------------------


def _math(_: Path | None) -> Contestant:
    """Standard attention: the score matrix in memory, in the dtype of the inputs."""
    torch = import_module("torch")

    def prepare(point: Point, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        groups = point.heads // point.heads_kv
        hidden = None
        if point.causal:
            hidden = torch.ones(point.seqlen, point.seqlen, dtype=torch.bool, device=q.device).triu(1)

        def call() -> Any:
            qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
            if groups > 1:
                kt, vt = (x.repeat_interleave(groups, dim=1) for x in (kt, vt))
            scores = qt @ (kt * point.head_dim**-0.5).transpose(-1, -2)
            if hidden is not None:
                scores.masked_fill_(hidden, float("-inf"))
            return (torch.softmax(scores, dim=-1) @ vt).transpose(1, 2)

        return call

    return Contestant("math", prepare)


def _sdpa(name: str, backend: str, _: Path | None) -> Contestant:
    """torch.nn.functional.scaled_dot_product_attention, held to one backend."""
    torch = import_module("torch")
    attention = import_module("torch.nn.attention")
    allowed = getattr(attention.SDPBackend, backend)

    def prepare(point: Point, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"is_causal": point.causal}
        if point.heads != point.heads_kv:
            options["enable_gqa"] = True
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(qt, kt, vt, **options).transpose(1, 2)

    return Contestant(name, prepare, partial(attention.sdpa_kernel, allowed))


def _fa3(library: Path | None) -> Contestant:
    """FlashAttention-3: the operator of a library file, or of an installed package."""
    torch = import_module("torch")
    if library is None:
        for package in ("flash_attn_3._C", "flash_attn_interface"):
            try:
                import_module(package)
                break
            except (ImportError, OSError):
                continue
        else:
            raise Missing("neither flash_attn_3 nor flash_attn_interface is installed, and no --fa3-library is given")
    else:
        # The runtime that the library was built with need not be on the loader's path: one beside it will do.
        try:
            for runtime in sorted(library.parent.glob("libcudart.so*")):
                ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
            torch.ops.load_library(str(library))
        except OSError as error:
            raise Missing(f"{library.name} does not load: {error}") from error
    try:
        operator = torch.ops.flash_attn_3.fwd
    except AttributeError:
        raise Missing("what was loaded registers no operator flash_attn_3::fwd") from None

    def prepare(point: Point, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        scale = point.head_dim**-0.5
        return lambda: operator(q, k, v, softmax_scale=scale, is_causal=point.causal, num_splits=1)[0]

    return Contestant("fa3", prepare)


def _fa4(_: Path | None) -> Contestant:
    """FlashAttention-4's CuTe kernels. They compile at a shape's first call, outside of the timed region."""
    try:
        flash_attn_func = import_module("flash_attn.cute").flash_attn_func
    except (ImportError, AttributeError, OSError) as error:
        raise Missing(f"flash_attn.cute cannot be imported: {error}") from error

    def prepare(point: Point, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        def call() -> Any:
            result = flash_attn_func(q, k, v, causal=point.causal)
            return result[0] if isinstance(result, tuple) else result

        return call

    return Contestant("fa4", prepare)


def _flex(_: Path | None) -> Contestant:
    """FlexAttention, compiled, with a block mask where causal."""
    torch = import_module("torch")
    try:
        flex = import_module("torch.nn.attention.flex_attention")
        import_module("triton")
    except ImportError as error:
        raise Missing(f"FlexAttention cannot be compiled: {error}") from error
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def visible(batch: Any, head: Any, i: Any, j: Any) -> Any:
        return i >= j

    def prepare(point: Point, q: Any, k: Any, v: Any) -> Callable[[], Any]:
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"enable_gqa": point.heads != point.heads_kv}
        if point.causal:
            options["block_mask"] = flex.create_block_mask(visible, None, None, point.seqlen, point.seqlen, q.device)
        return lambda: compiled(qt, kt, vt, **options).transpose(1, 2)

    return Contestant("flex", prepare)


_FACTORIES: dict[str, Callable[[Path | None], Contestant]] = {
    **{f"fa2gen-{arch}": partial(_fa2gen, arch) for arch in reversed(ARCHES)},
    "cudnn": partial(_sdpa, "cudnn", "CUDNN_ATTENTION"),
    "fa2": partial(_sdpa, "fa2", "FLASH_ATTENTION"),
    "fa3": _fa3,
    "fa4": _fa4,
    "math": _math,
    "flex": _flex,
}
NAMES = tuple(_FACTORIES)


def in_order(names: Iterable[str]) -> list[str]:
    """Ours first, then the peers, as in tables and figures; unknown names last."""
    given = set(names)
    return [name for name in NAMES if name in given] + sorted(given - set(NAMES))
