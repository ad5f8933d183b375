"""Who is measured: every contestant behind one callable, and the reason for each that is missing.

A contestant's `prepare(point, q, k, v, dout)`, of tensors (batch, seqlen, heads, head_dim), those of a ragged batch
(total, heads, head_dim), gives a callable without arguments that returns tensors of the same layout: at a forward point
(out,), at a backward one (dq, dk, dv) alone, from a forward pass that is made beforehand. Layout changes are views,
made beforehand too.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from fa2gen.arch import ARCHES, ArchName
from fa2gen.bench.points import Point
from fa2gen.bench.workloads import WORKLOADS, Workload, documents_of
from fa2gen.errors import InvalidInput
from fa2gen.expression import evaluate
from fa2gen.features import key_range
from fa2gen.features.expression import named_values
from fa2gen.gpus import current_device
from fa2gen.groups import walk_of, with_groups
from fa2gen.layout import ELEMENT_BYTES
from fa2gen.options import CacheShape
from fa2gen.select import select
from fa2gen.spec import SAME, Direction, KernelSpec, Tiling

__all__ = [
    "DEFAULT",
    "DENSE",
    "DETERMINISTIC",
    "NAMES",
    "OURS",
    "PLAIN",
    "VARLEN",
    "Contestant",
    "Missing",
    "check",
    "find",
    "in_order",
    "is_ours",
    "of_specs",
    "refuse_caches",
]

DETERMINISTIC = "-det"  # ends the names of those of ours whose gradients have the same bits in every run
DENSE = "fa2gen-dense"
"""What raggedness and pages cost. Of ragged batches: dense calls of ours, one for each run of sequences of one length;
over pages: our call on the same keys in order, of 8-bit numbers in 16 bits."""
PLAIN = "fa2gen-plain"
"""Of expressions: our kernel of the mask alone, which computes something else; what an expression costs."""
VARLEN = "fa2gen-varlen"
"""Of documents: our ragged call of them."""
OF_FLEX = ("flex", "flex-flash", "fa3", "fa4")
"""The peers of expressions."""
OURS = tuple(f"fa2gen-{arch}" for arch in reversed(ARCHES))
DEFAULT = (*OURS, "cudnn", "fa2", "fa3", "fa4")
"""`math` and `flex` only when asked for: one keeps the S x S matrix in memory, the other compiles at each point. So
does `flex-flash`, with kernels of FlashAttention-4."""

Call = Callable[[], Any]
Prepare = Callable[[Point, Any, Any, Any, Any], Call]
Forward = Callable[[Point, Any, Any, Any], Call]
"""As Prepare, of the forward pass alone, and its call returns out itself."""


MATH_MATRICES = {"fwd": 2, "bwd": 4}


class Missing(Exception):
    """A contestant that cannot take part here; the message says why, and what would change that."""


@dataclass(frozen=True)
class Contestant:
    """One implementation.

    context     is entered around calls: which backend torch may pick.
    specs       of ours: the kernels that it is made of, one for each problem, where it is not the selector's choice.
    agrees      whether its results are the others'.
    stands_for  whether a point is one that it is there for: at others it is not missed.
    """

    name: str
    prepare: Prepare
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    specs: tuple[KernelSpec, ...] = ()
    agrees: bool = True
    stands_for: Callable[[Point], bool] = lambda _: True


def is_ours(name: str) -> bool:
    return name.startswith("fa2gen-")


def find(
    names: Sequence[str], fa3_library: Path | None = None, direction: Direction = "fwd"
) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants of those names that can run in a direction on the current device, and why the others can not.

    fa3_library  a file that registers the operators flash_attn_3::*; else an installed package is looked for.

    Raises InvalidInput for an unknown name.
    """
    check(names)
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for name in dict.fromkeys(names):
        try:
            refuse_caches(name, direction == "decode")
            found.append(_FACTORIES[name](direction, fa3_library))
        except Missing as error:
            missing[name] = str(error)
    return found, missing


def refuse_caches(name: str, has_cache: bool) -> None:
    """Raises Missing where keys lie in a cache, or pages of one, and a contestant has no calls over them."""
    if has_cache and name not in OVER_CACHES:
        raise Missing(f"over caches there are {', '.join(OVER_CACHES)}")


def check(names: Sequence[str]) -> None:
    """Raises InvalidInput for a name that is no contestant's."""
    for name in names:
        if name not in NAMES:
            raise InvalidInput(f"no contestant {name!r}; there are {', '.join(NAMES)}")


def of_specs(specs: Sequence[KernelSpec]) -> list[Contestant]:
    """Contestants that are these very kernels: one for each tiling, with all problems that it is given for."""
    of_tiling: dict[Tiling, list[KernelSpec]] = {}
    for spec in specs:
        of_tiling.setdefault(spec.tiling, []).append(spec)
    return [_of_tiling(tiling, tuple(given)) for tiling, given in of_tiling.items()]


def _by_autograd(forward: Forward) -> Prepare:
    """Gradients of a graph that is made beforehand, and kept: what is timed is the backward pass alone."""
    torch = import_module("torch")

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        if point.direction == "fwd" and point.calls != "step":
            call = forward(point, q, k, v)
            return lambda: (call(),)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            whole = forward(point, *leaves)

        def step() -> Any:
            with torch.enable_grad():
                out = whole()
            return torch.autograd.grad(out, leaves, dout)

        if point.calls == "step":
            return step
        with torch.enable_grad():
            out = whole()
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return prepare


def _bounds(lengths: Iterable[int], device: Any) -> Any:
    """cu_seqlens of sequences of those lengths."""
    torch = import_module("torch")
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def _runs(point: Point, *tensors: Any) -> Iterator[tuple[Point, list[Any]]]:
    """Of a ragged batch, each run of neighbours of one length as a dense batch: its point, and its part of tensors."""
    runs = [(length, len(list(same))) for length, same in itertools.groupby(point.lengths)]
    cuts = [x.split([length * batch for length, batch in runs]) for x in tensors]
    for (length, batch), parts in zip(runs, zip(*cuts, strict=True), strict=True):
        dense = replace(point, batch=batch, seqlen=length, lengths=())
        yield dense, [part.unflatten(0, (batch, length)) for part in parts]


def _by_sequence(forward: Forward) -> Forward:
    """Of a ragged batch, a call for each run of neighbours of one length."""
    torch = import_module("torch")

    def of_all(point: Point, q: Any, k: Any, v: Any) -> Call:
        if not point.lengths:
            return forward(point, q, k, v)
        _refuse_expression(point, "a call for each sequence")
        calls = [forward(run, *parts) for run, parts in _runs(point, q, k, v)]
        return lambda: torch.cat([call().flatten(0, 1) for call in calls])

    return of_all


def _refuse_expression(point: Point, who: str, but: str | None = None) -> None:
    if point.expression and point.workload != but:
        raise Missing(f"{who} takes no score or mask as this one")


def _workload(point: Point, device: Any) -> tuple[Workload, Any]:
    """Of a point of preset flex: what it measures, and its input."""
    if point.workload not in WORKLOADS:
        raise Missing("of expressions it is measured in preset flex alone")
    found = WORKLOADS[point.workload]
    return found, found.input(point.batch, point.seqlen, point.heads, device)


def _named(point: Point, device: Any) -> dict[str, Any]:
    """What the expression of a point names, by token."""
    from fa2gen.cases import expression_tensors

    if not point.expression:
        return {}
    if point.workload:
        of, given = _workload(point, device)
        return {} if of.numbers is None else {"input_0": given}
    return expression_tensors(
        point.problem, point.shape._replace(seqlen_q=point.seqlen, seqlen_k=point.seqlen), 0, device
    )


def _refuse_ragged(point: Point, who: str) -> None:
    if point.lengths:
        raise Missing(f"{who} is measured on dense batches alone")


# Ours ----------------------------------------------------------------------------------------------------------------


def _fa2gen(arch: ArchName, deterministic: bool, direction: Direction, _: Path | None) -> Contestant:
    """Forward on the device's own family what a user calls; else the kernel that the selector gives, launched alone."""
    torch = import_module("torch")
    from fa2gen.ops import flash_attn_with_kvcache

    if deterministic and direction == "fwd":
        raise Missing("the forward pass is always deterministic")
    capability = torch.cuda.get_device_capability()
    if arch == "sm90" and capability != (9, 0):
        raise Missing(f"its kernels run on compute capability 9.0, this GPU has {capability[0]}.{capability[1]}")
    native = _native()

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        if arch != native and (point.tokens or point.page_size):
            raise Missing("over caches it is what a user calls that is measured, which runs the device's own family")
        if point.direction == "decode":
            cache = _cache(point, k, v)
            return lambda: (flash_attn_with_kvcache(q, *cache[:2], **cache[2], causal=point.causal),)
        if point.direction == "fwd" and arch == native and not point.expression:
            return _by_autograd(_called)(point, q, k, v, dout)
        if point.preset == "host":
            raise Missing("host time is that of what a user calls, which runs the device's own family here")
        point = replace(point, deterministic=deterministic)
        return _launched(point, _selected(point, arch), q, k, v, dout)

    return Contestant(f"fa2gen-{arch}{DETERMINISTIC if deterministic else ''}", prepare)


def _called(point: Point, q: Any, k: Any, v: Any) -> Call:
    """What a user calls, of a forward point."""
    from fa2gen.ops import flash_attn_func, flash_attn_varlen_func
    from fa2gen.serving import vllm

    options = point.options
    said: dict[str, Any] = {"causal": options.causal, "window_size": (options.window_left, options.window_right)}
    if not point.lengths:
        return lambda: flash_attn_func(q, k, v, **said)
    bounds = of_keys = _bounds(point.lengths, q.device)
    said |= {"max_seqlen_q": max(point.lengths), "max_seqlen_k": point.seqlen}
    if point.page_size:
        k, v, places = _cache(point, k, v)
        said |= {"seqused_k": places.pop("cache_seqlens"), "cu_seqlens_q": bounds, **places}
        return lambda: vllm.flash_attn_varlen_func(q, k, v, **said)
    if point.keys:
        k, v, of_keys = *_packed(point, k, v), _bounds(point.keys, q.device)
    return lambda: flash_attn_varlen_func(q, k, v, bounds, of_keys, **said)


def _packed(point: Point, *tensors: Any) -> Iterator[Any]:
    """Of (batch, seqlen, heads, head_dim) the keys that sequences have, one behind the other."""
    cat = import_module("torch").cat
    return (cat([x[entry, :keys] for entry, keys in enumerate(point.keys)]) for x in tensors)


def _cache(point: Point, k: Any, v: Any) -> tuple[Any, Any, dict[str, Any]]:
    """(k_cache, v_cache, where keys are in them and their scales, as flash_attn says it): all on the device."""
    torch = import_module("torch")
    from fa2gen.ops.validate_cache import CACHE_DTYPES

    keys = point.keys or (point.seqlen,) * point.batch
    said = {"cache_seqlens": torch.tensor(keys, dtype=torch.int32, device=k.device)}
    if point.cache_dtype != SAME:
        dtype = next(dtype for dtype, name in CACHE_DTYPES.items() if name == point.cache_dtype)
        unit = 16.0  # of which random numbers are some, and none 128
        k, v = ((x * unit).to(dtype) for x in (k, v))
        scale = torch.full((point.batch, point.heads_kv), 1 / unit, device=k.device)
        said |= {"k_descale": scale, "v_descale": scale}
    if not point.page_size:
        return k, v, said
    pages = point.batch * point.seqlen // point.page_size
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).to(k.device)
    said["block_table"] = order.argsort().view(point.batch, -1).to(torch.int32)
    shape = (pages, point.page_size, *k.shape[2:])
    return k.view(shape)[order], v.view(shape)[order], said


def _native() -> ArchName:
    """The family of kernels that the current device is given."""
    return "sm90" if import_module("torch").cuda.get_device_capability() == (9, 0) else "sm80"


def _of_tiling(tiling: Tiling, specs: tuple[KernelSpec, ...]) -> Contestant:
    of_problem = {spec.problem: spec for spec in specs}

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        if point.problem not in of_problem:
            raise Missing("its tiling is not asked for here")
        return _launched(point, of_problem[point.problem], q, k, v, dout)

    return Contestant(f"fa2gen-{'_'.join(tiling.words)}", prepare, specs=specs)


def _selected(point: Point, arch: ArchName) -> KernelSpec:
    device = current_device()
    plan = select(point.problem, device, arch, point.seqlen).plan
    return with_groups(plan, *walk_of(plan, point.shape, point.options, device.num_sms)).spec


def _launched(
    point: Point, spec: KernelSpec, q: Any, k: Any, v: Any, dout: Any, into: Sequence[Any] | None = None
) -> Call:
    """The kernel launched alone; backward after a forward pass of its family that is made beforehand.

    into  tensors for its results.
    """
    torch = import_module("torch")
    from fa2gen import cases

    def launcher(point: Point, spec: KernelSpec, tensors: dict[str, Any]) -> Callable[[], None]:
        shaped = dict(tensors)
        if point.lengths:  # a kernel takes one batch of all sequences, and their bounds
            shaped = {name: x.unsqueeze(0) for name, x in tensors.items()}
            bounds = _bounds(point.lengths, q.device)
            shaped |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
        shaped |= named
        return cases.prepare(cases.load(spec), cases.Case(spec, point.shape, point.options, shaped, {}))

    if point.direction == "decode":
        return _launched_over_a_cache(point, spec, q, k, v)
    forward = replace(point, direction="fwd", deterministic=False)
    named = _named(point, q.device)
    tensors = {
        "q": q,
        "k": k,
        "v": v,
        "o": into[0] if into and point.direction == "fwd" else _like_o(q, v),
        "lse": q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3]).float(),
    }
    if point.direction == "fwd":
        call = launcher(forward, spec, tensors)
        return lambda: (call(), (tensors["o"],))[1]
    launcher(forward, _selected(forward, spec.tiling.arch), tensors)()
    gradients = dict(zip(("dq", "dk", "dv"), into or [torch.empty_like(x) for x in (q, k, v)], strict=True))
    back = launcher(point, spec, {**tensors, **gradients, "dout": dout})
    return lambda: (back(), tuple(gradients.values()))[1]


def _launched_over_a_cache(point: Point, spec: KernelSpec, q: Any, k: Any, v: Any) -> Call:
    """`_launched` of a decoding kernel."""
    from fa2gen import cases

    k_cache, v_cache, places = _cache(point, k, v)
    out, lse = _like_o(q, v), q.new_empty(q.shape[0], q.shape[2], q.shape[1]).float()
    table = places.get("block_table")
    shape = CacheShape(
        *point.shape,
        entries=k_cache.shape[0],
        page_size=point.page_size,
        table_rows=0 if table is None else table.shape[0],
        table_stride=0 if table is None else table.stride(0),
    )
    tensors = {"q": q, "k": k_cache, "v": v_cache, "o": out, "lse": lse, **places}
    call = cases.prepare(cases.load(spec), cases.Case(spec, shape, point.options, tensors, {}))
    return lambda: (call(), (out,))[1]


def _like_o(q: Any, v: Any) -> Any:
    """Room for the output."""
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _dense(*_: Any) -> Contestant:
    """In place of a ragged launch of ours dense ones, into parts of the same results; over pages a cache without."""
    torch = import_module("torch")

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        arch = _native()
        if point.page_size:
            plain = replace(point, page_size=0)
            if point.cache_dtype != SAME:
                k, v, said = _cache(plain, k, v)
                k, v = (x.to(q.dtype) * said["k_descale"].to(q.dtype)[:, None, :, None] for x in (k, v))
                plain = replace(plain, cache_dtype=SAME)
            return _fa2gen(arch, False, point.direction, None).prepare(plain, q, k, v, dout)
        _refuse_expression(point, "a call for each sequence")
        results = (_like_o(q, v),) if point.direction == "fwd" else tuple(torch.empty_like(x) for x in (q, k, v))
        calls = [
            _launched(run, _selected(run, arch), x, y, z, dx, into)
            for run, (x, y, z, dx, *into) in _runs(point, q, k, v, dout, *results)
        ]
        return lambda: ([call() for call in calls], results)[1]

    return Contestant(
        DENSE, prepare, stands_for=lambda point: bool(point.lengths or point.page_size) and point.preset != "host"
    )


def _plain(*_: Any) -> Contestant:
    """Causal where a mask is an expression's: images are a causal text."""

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        plain = replace(point, workload="", causal=True)
        return _launched(plain, _selected(plain, _native()), q, k, v, dout)

    return Contestant(PLAIN, prepare, agrees=False, stands_for=lambda point: bool(point.workload))


def _of_documents(*_: Any) -> Contestant:
    """What a user of ragged batches calls, the same documents packed as sequences."""

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        lengths = tuple(length for entry in range(point.batch) for length in documents_of(entry, point.seqlen))
        packed = replace(point, workload="", batch=len(lengths), seqlen=max(lengths), lengths=lengths)
        call = _launched(packed, _selected(packed, _native()), *(x.flatten(0, 1) for x in (q, k, v, dout)))
        return lambda: tuple(x.unflatten(0, (point.batch, point.seqlen)) for x in call())

    return Contestant(VARLEN, prepare, stands_for=lambda point: point.workload == "documents")


def _window(point: Point) -> tuple[int, int] | None:
    """(left, right) as flash_attn says them; None where the point has no window."""
    options = point.options
    if options.window_left < 0 and options.window_right < 0:
        return None
    return options.window_left, 0 if options.causal else options.window_right


# Peers ---------------------------------------------------------------------------------------------------------------


def _math(*_: Any) -> Contestant:
    """Standard attention: the score matrix in memory, in the dtype of the inputs. Only where that fits."""
    torch = import_module("torch")

    def forward(point: Point, q: Any, k: Any, v: Any) -> Call:
        if q.is_cuda:
            # Scores and probabilities; backward those of the graph and the gradients of both.
            needed = MATH_MATRICES[point.direction] * point.batch * point.heads * point.seqlen**2 * ELEMENT_BYTES
            held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            if needed > (free := torch.cuda.mem_get_info()[0] + held):
                raise Missing(f"needs {needed / 2**30:.0f} GiB for its score matrices; {free / 2**30:.0f} GiB are free")
        groups = point.heads // point.heads_kv
        hidden = None
        if point.problem.mask != "full":
            i, j = (torch.arange(point.seqlen, device=q.device) for _ in range(2))
            first, end = key_range(point.options, point.seqlen, point.seqlen, i.unsqueeze(-1))
            hidden = (j < first) | (j >= end)
        of = point.options.expression
        if of:
            program, index = point.problem.program, partial(torch.arange, device=q.device)
            places = {
                "i": index(point.seqlen)[:, None],
                "j": index(point.seqlen),
                "h": index(point.heads)[:, None, None],
            }
            places |= {"b": index(point.batch)[:, None, None, None], "hk": places["h"] // groups}
            places |= {"seqlen_q": point.seqlen, "seqlen_k": point.seqlen}
            places |= named_values(program, of.numbers, list(_named(point, q.device).values()))
            unseen = ~evaluate(program, "allow", torch, places).to(q.device)
            hidden = unseen if hidden is None else hidden | unseen

        def call() -> Any:
            qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
            if groups > 1:
                kt, vt = (x.repeat_interleave(groups, dim=1) for x in (kt, vt))
            scores = qt @ (kt * point.head_dim**-0.5).transpose(-1, -2)
            if of:
                scores = evaluate(program, "score", torch, {**places, "s": scores})
            if hidden is not None:
                scores.masked_fill_(hidden, float("-inf"))
            return (torch.softmax(scores, dim=-1) @ vt).transpose(1, 2)

        return call

    return Contestant("math", _by_autograd(_by_sequence(forward)))


def _sdpa(name: str, backend: str, *_: Any) -> Contestant:
    """torch.nn.functional.scaled_dot_product_attention, held to one backend. It takes no ragged batches: of those, the
    operator of FlashAttention-2 itself. cuDNN's (torch 2.11, H100) makes a plan at each call, in 20 to 70 ms, in which
    the GPU idles, and its gradients are not the others'."""
    torch = import_module("torch")
    attention = import_module("torch.nn.attention")
    allowed = getattr(attention.SDPBackend, backend)

    def forward(point: Point, q: Any, k: Any, v: Any) -> Call:
        _refuse_expression(point, "torch's scaled_dot_product_attention")
        if _window(point):
            raise Missing("torch's scaled_dot_product_attention takes no window")
        if point.calls == "new lengths" and name == "cudnn":
            raise Missing("cuDNN makes a plan of each new length, in tens of milliseconds: the run would take minutes")
        if point.lengths:
            if name != "fa2":
                _refuse_ragged(point, "cuDNN")
            bounds = _bounds(point.lengths, q.device)
            of_batch = (bounds, bounds, point.seqlen, point.seqlen, 0.0, point.causal, False)
            return lambda: torch.ops.aten._flash_attention_forward(q, k, v, *of_batch)[0]
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"is_causal": point.causal}
        if point.heads != point.heads_kv:
            options["enable_gqa"] = True
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(qt, kt, vt, **options).transpose(1, 2)

    return Contestant(name, _by_autograd(forward), partial(attention.sdpa_kernel, allowed))


def _fa3(direction: Direction, library: Path | None) -> Contestant:
    """FlashAttention-3: the operators of a library file, or of an installed package."""
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
    operators = torch.ops.flash_attn_3
    for needed in dict.fromkeys(("fwd", "fwd" if direction == "decode" else direction)):
        if not hasattr(operators, needed):
            raise Missing(f"what was loaded registers no operator flash_attn_3::{needed}")

    def prepare(point: Point, q: Any, k: Any, v: Any, dout: Any) -> Call:
        if point.calls == "step":
            raise Missing("its operators have no autograd formula")
        _refuse_expression(point, "FlashAttention-3", but="softcap")
        options: dict[str, Any] = {"softmax_scale": point.head_dim**-0.5, "is_causal": point.causal}
        if point.workload:
            options["softcap"] = WORKLOADS[point.workload].cap
        if window := _window(point):
            options |= zip(("window_size_left", "window_size_right"), window, strict=True)
        if point.lengths:
            bounds = _bounds(point.lengths, q.device)
            options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": None if point.page_size else bounds}
            options |= {"max_seqlen_q": max(point.lengths), "max_seqlen_k": point.seqlen}
        if point.direction == "decode" or point.page_size:
            if point.cache_dtype != SAME:
                raise Missing("over caches of 8 bits its queries have 8 bits too")
            k_cache, v_cache, said = _cache(point, k, v)
            options |= {"seqused_k": said["cache_seqlens"], "page_table": said.get("block_table")}
            return lambda: operators.fwd(q, k_cache, v_cache, **options, num_splits=0)[:1]
        if point.direction == "fwd":
            return lambda: operators.fwd(q, k, v, **options, num_splits=1)[:1]
        out, lse = operators.fwd(q, k, v, **options, num_splits=1)[:2]
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))

        def call() -> Any:
            operators.bwd(dout, q, k, v, out, lse, *gradients, **options)
            return gradients

        return call

    return Contestant("fa3", prepare)


def _fa4(*_: Any) -> Contestant:
    """FlashAttention-4's CuTe kernels. They compile at a shape's first call, outside of the timed region."""
    try:
        flash_attn_func = import_module("flash_attn.cute").flash_attn_func
    except (ImportError, AttributeError, OSError) as error:
        raise Missing(f"flash_attn.cute cannot be imported: {error}") from error

    def forward(point: Point, q: Any, k: Any, v: Any) -> Call:
        _refuse_ragged(point, "FlashAttention-4")
        _refuse_expression(point, "FlashAttention-4", but="softcap")
        options: dict[str, Any] = {"causal": point.causal}
        if point.workload:
            options["softcap"] = WORKLOADS[point.workload].cap
        if window := _window(point):
            options["window_size"] = tuple(None if side < 0 else side for side in window)

        def call() -> Any:
            result = flash_attn_func(q, k, v, **options)
            return result[0] if isinstance(result, tuple) else result

        return call

    return Contestant("fa4", _by_autograd(forward))


def _flex(name: str, kernels: Mapping[str, str], needed: str, *_: Any) -> Contestant:
    """FlexAttention, compiled, with a block mask where causal.

    kernels  its options: whose kernels it writes.
    needed   the package that they are compiled by.
    """
    torch = import_module("torch")
    try:
        flex = import_module("torch.nn.attention.flex_attention")
        import_module(needed)
    except (ImportError, AttributeError, OSError) as error:
        raise Missing(f"FlexAttention cannot be compiled: {error}") from error
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    # A compiled graph may give its buffers away in its backward pass, which is then refused a second time.
    keeps_graph = partial(import_module("torch._functorch.config").patch, donated_buffer=False)

    def forward(point: Point, q: Any, k: Any, v: Any) -> Call:
        _refuse_ragged(point, "FlexAttention")
        qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
        options: dict[str, Any] = {"enable_gqa": point.heads != point.heads_kv}
        if kernels:
            options["kernel_options"] = dict(kernels)
        if point.expression:
            of, given = _workload(point, q.device)
            if of.modify:
                options["score_mod"] = of.modify(given)
            sizes = (point.batch if of.allow else None, None, point.seqlen, point.seqlen, q.device)
            options["block_mask"] = flex.create_block_mask(of.visible(given), *sizes)
        elif point.problem.mask != "full":

            def visible(batch: Any, head: Any, i: Any, j: Any) -> Any:
                first, end = key_range(point.options, point.seqlen, point.seqlen, i)
                return (j >= first) & (j < end)

            options["block_mask"] = flex.create_block_mask(visible, None, None, point.seqlen, point.seqlen, q.device)
        return lambda: compiled(qt, kt, vt, **options).transpose(1, 2)

    return Contestant(name, _by_autograd(forward), keeps_graph)


_FACTORIES: dict[str, Callable[[Direction, Path | None], Contestant]] = {
    **{f"fa2gen-{arch}": partial(_fa2gen, arch, False) for arch in reversed(ARCHES)},
    **{f"fa2gen-{arch}{DETERMINISTIC}": partial(_fa2gen, arch, True) for arch in reversed(ARCHES)},
    DENSE: _dense,
    PLAIN: _plain,
    VARLEN: _of_documents,
    "cudnn": partial(_sdpa, "cudnn", "CUDNN_ATTENTION"),
    "fa2": partial(_sdpa, "fa2", "FLASH_ATTENTION"),
    "fa3": _fa3,
    "fa4": _fa4,
    "math": _math,
    "flex": partial(_flex, "flex", {}, "triton"),
    "flex-flash": partial(_flex, "flex-flash", {"BACKEND": "FLASH"}, "flash_attn.cute"),
}
NAMES = tuple(_FACTORIES)
OVER_CACHES = (*OURS, DENSE, "fa3")


def in_order(names: Iterable[str]) -> list[str]:
    """Ours first, then the peers, as in tables and figures; unknown names last."""
    given = set(names)
    return [name for name in NAMES if name in given] + sorted(given - set(NAMES))
