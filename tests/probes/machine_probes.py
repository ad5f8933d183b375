"""Small kernels that ask a machine what an instruction does: one for each form of operand that the templates use.

They use the primitives of templates/ptx/ alone, on small integers: sums of those are exact in any order, so that a
result is right to the bit or wrong. The same text runs on the CPU's model (tests/cpu) and on a GPU (tests/gpu), and is
compiled where there is neither (tests/compile). What the templates use is read off plans and renders: `used_forms`. A
form that no probe shows fails tests/unit/test_probes.py.
"""

from __future__ import annotations

import functools
import itertools
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fa2gen.catalog import catalogue, tuned_rows
from fa2gen.compile import Unit
from fa2gen.cpu.build import build_source
from fa2gen.cpu.kernel import SHARED_BASE, tensor_map, view_of
from fa2gen.cpu.run import Argument, Job, run
from fa2gen.features import Param
from fa2gen.layout import Panels, align_up, ceil_div, swizzle
from fa2gen.plan import KernelPlan, TensorMapPlan, feasible_tilings, make_plan
from fa2gen.ptx import Wgmma
from fa2gen.render import Rendered, _environment, finish, render
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem, Tiling

FOLDER = Path(__file__).parent
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SWIZZLE_MODES = {128: 1, 64: 2, 32: 3}
SWIZZLES = {128: (0, 7), 64: (1, 3), 32: (2, 1)}  # shift and mask of a row's number, in rows of so many bytes

Values = list[torch.Tensor]


@dataclass(frozen=True)
class Probe:
    """One launch of one block.

    k         what the template is rendered with; `k.params` are the fields of its Params.
    maps      (box_rows, box_columns, bytes of a panel's row, tensor): the tensor maps that it takes, in order.
    values    of Params: a number, or for a pointer the tensor that it leads to.
    case      (what tensors hold before, and what after); CPU tensors, of four dimensions where a map leads to them.
    forms     what the probe shows, of `used_forms`.
    """

    name: str
    template: str
    k: SimpleNamespace
    maps: tuple[tuple[int, int, int, int], ...]
    values: Mapping[str, int]
    case: Callable[[], tuple[Values, Values]]
    num_threads: int
    shared_bytes: int
    forms: frozenset[str]
    arch: str = "sm90"

    @property
    def targets(self) -> tuple[str, ...]:
        """NVRTC's architectures. SM80 kernels are compiled for 9.0 too, where they run as well."""
        return ("sm_80", "sm_90") if self.arch == "sm80" else ("sm_90a",)

    @property
    def params_format(self) -> str:
        """As C++ lays it out: on a multiple of 8 bytes where there is a pointer."""
        codes = "".join(param.code for param in self.k.params)
        return f"<{codes}" + ("4x" if "Q" in codes and codes.count("i") % 2 else "")

    @property
    def tensor_maps(self) -> tuple[TensorMapPlan, ...]:
        """Named after their tensors' numbers."""
        return tuple(TensorMapPlan(str(tensor), columns, rows, span) for rows, columns, span, tensor in self.maps)

    def unit(self, target: str) -> Unit:
        """For NVRTC."""
        rendered = source(self, "cuda")
        launch = {"shared_memory_bytes": self.shared_bytes}
        return Unit("probe", rendered.source, target, launch, rendered.origins)


def source(probe: Probe, target: str) -> Rendered:
    """The probe's text for either compiler."""
    return _source(probe.template, target, probe.k)


def _source(template: str, target: str, k: SimpleNamespace) -> Rendered:
    text = (FOLDER / f"{template}.cu.j2").read_text(encoding="utf-8")
    return finish(_environment(target).from_string(text).render(k=k), template)


def run_on_cpu(probe: Probe, **options: object) -> Values:
    """The tensors after a run on the CPU; `options` are Job's."""
    tensors, _ = probe.case()
    views = [view_of(str(i), x) for i, x in enumerate(tensors)]
    maps = [tensor_map(plan, views[int(plan.name)], int(plan.name)) for plan in probe.tensor_maps]
    values, pointers, offset = [], [], 0
    for param in probe.k.params:
        values.append(probe.values[param.name])
        if param.code == "Q":
            pointers.append((offset, values[-1], 0))
        offset += struct.calcsize(f"<{param.code}")
    params = Argument(struct.pack(probe.params_format, *values), tuple(pointers))
    job = Job(
        (1, 1, 1), probe.num_threads, SHARED_BASE, probe.shared_bytes, probe.arch == "sm90", (*maps, params), **options
    )
    run(build_source("probe", source(probe, "cpu")), job, [view.memory(str(i)) for i, view in enumerate(views)])
    return tensors


def differences(found: Values, expected: Values) -> str:
    """What differs, bit by bit; "" where nothing does."""
    text = []
    for number, (x, y) in enumerate(zip(found, expected, strict=True)):
        bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
        wrong = (x.cpu().view(bits) != y.view(bits)).nonzero()
        if len(wrong):
            where = tuple(wrong[0].tolist())
            text.append(f"tensor {number}: {len(wrong)} of {x.numel()}, first {where}: {x[where]}, not {y[where]}")
    return "; ".join(text)


# What probes are made of ---------------------------------------------------------------------------------------------


def _k(params: Mapping[str, str], **values: object) -> SimpleNamespace:
    """What the primitives look at: the default of every switch, and `values`."""
    fields = tuple(Param(name, ctype) for name, ctype in params.items())
    numbers = {"mma_dtype": values["dtype"], "packed_dtypes": (values["dtype"],)} if "dtype" in values else {}
    tiling = Tiling(arch="sm90", tile_m=64, tile_n=64, num_mma_warps=4)
    return SimpleNamespace(tiling=tiling, params=fields, name="probe", keeps_in_l2=False, **numbers, **values)


def integers(*shape: int, seed: int = 0, most: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(-most, most + 1, shape))


def grid(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column of each element."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return row, column


def image(rows: torch.Tensor, span: int) -> torch.Tensor:
    """16-bit rows of `span` bytes as they lie in shared memory, from a multiple of 1024 bytes on."""
    flat = torch.empty_like(rows.flatten())
    places = [swizzle(2 * i, span) // 2 for i in range(len(flat))]
    flat[places] = rows.flatten()
    return flat


def _panels(extent: int, span: int) -> str:
    """How much of its panels a tile fills: what its last panel holds, and whether there are others."""
    columns = span // 2
    parts = [f"{span}-byte panels" if extent > columns else f"a {span}-byte panel"]
    if extent % columns:
        parts.append("the last partly filled")
    return ", ".join(parts)


# wgmma ---------------------------------------------------------------------------------------------------------------


def wgmma_form(op: Wgmma, depth: int, span: int) -> str:
    """`depth` is the number of products that are summed."""
    kind = op.function.partition("k16_")[2]
    form = f"wgmma {kind}, {_panels(op.n if op.b_transposed else depth, span)}"
    return form + (", half of the last step" if depth % 16 else "")


def _wgmma(op: Wgmma, span: int, depth: int, *, head_dim: int = 0, first: int = 0) -> Probe:
    """One product.

    head_dim  of the MN-major operand in shared memory, if it is not all that the product takes of it.
    first     the panel of that operand where the product begins.
    """
    if op.a_transposed:
        a_tile, a_shape = Panels(depth, head_dim, span), (depth, head_dim)
    elif op.b_transposed:
        a_tile, a_shape = Panels(64, depth, span), (64, depth)
    else:  # the second 64 rows of two warpgroups'
        a_tile, a_shape = Panels(128, depth, span), (128, depth)
    b_columns = op.n if op.a_transposed else head_dim or op.n
    b_shape = (depth, b_columns) if op.b_transposed else (op.n, depth)
    b_tile = Panels(*b_shape, span)
    smem_b = align_up(a_tile.bytes, 1024)
    smem_barrier = smem_b + align_up(b_tile.bytes, 1024)
    k = _k(
        {"d": "float*"},
        dtype=op.dtype,
        op=op,
        wgmmas=(op,),
        accumulator_counts=(op.num_accumulators,),
        num_p=4,
        a=a_tile,
        b=b_tile,
        a_start=first * a_tile.panel_bytes if op.a_transposed else 0 if op.b_transposed else 64 * span,
        b_start=first * b_tile.panel_bytes if op.b_transposed else 0,
        smem_b=smem_b,
        smem_barrier=smem_barrier,
        steps=ceil_div(depth, 16),
        steps_per_panel=span // 32,
        desc_hi=SWIZZLE_MODES[span] << 30 | 8 * span >> 4,
    )

    def case() -> tuple[Values, Values]:
        a, b = integers(*a_shape), integers(*b_shape, seed=1)
        begin = first * span // 2
        if op.a == "registers":
            row, column = grid(64, depth)
            left = (row * 7 + column * 3) % 5 - 2
        elif op.a_transposed:
            left = _columns(a, begin, 64).T
        else:
            left = a[-64:]
        right = _columns(b, begin, op.n) if op.b_transposed else b.T
        tensors = [x.to(DTYPES[op.dtype])[None, :, None, :].contiguous() for x in (a, b)]
        return [*tensors, torch.full((64, op.n), torch.nan)], [*tensors, (left @ right).float()]

    return Probe(
        name=f"{op.function}_{op.dtype}_z{span}_k{depth}" + (f"_d{head_dim}_p{first}" if head_dim else ""),
        template="wgmma",
        k=k,
        maps=((a_tile.rows, span // 2, span, 0), (b_tile.rows, span // 2, span, 1)),
        values={"d": 2},
        case=case,
        num_threads=128,
        shared_bytes=smem_barrier + 16,
        forms=frozenset({wgmma_form(op, depth, span), f"wgmma {op.dtype}"}),
    )


def _columns(x: torch.Tensor, begin: int, count: int) -> torch.Tensor:
    """`count` columns from `begin` on; those that do not exist are zeros."""
    found = x[:, begin : begin + count]
    return torch.nn.functional.pad(found, (0, count - found.shape[1]))


def _wgmma_probes() -> Iterator[Probe]:
    for span in (128, 64, 32):
        # S = Q K^T: both K-major. A depth that does not fill its last step or panel is filled with zeros by TMA.
        for depth in sorted({8, 16, 72, 80, 128, span // 2}):
            yield _wgmma(Wgmma("bf16", 80, "shared", b_transposed=False), span, depth)
        # O += P V: A in registers, B MN-major; n is the head dim.
        for n in sorted({8, 72, 128, span // 2}):
            yield _wgmma(Wgmma("fp16", n, "registers", b_transposed=True), span, 64)
    for n in (8, 256):
        yield _wgmma(Wgmma("fp16", n, "shared", b_transposed=False), 128, 64)
    yield _wgmma(Wgmma("bf16", 256, "registers", b_transposed=True), 128, 80)
    # dP^T = V dO^T where V is in registers: B K-major.
    for depth in (72, 80):
        yield _wgmma(Wgmma("bf16", 80, "registers", b_transposed=False), 128, depth)
    # dQ = dS K: A K-major, B MN-major, all of the head dim or a slice from some panel on.
    for n in (8, 64, 72, 128):
        yield _wgmma(Wgmma("bf16", n, "shared", b_transposed=True), 128, 64)
    for n, head_dim in ((128, 256), (128, 200), (72, 200), (8, 136), (64, 192)):
        yield _wgmma(Wgmma("bf16", n, "shared", b_transposed=True), 128, 64, head_dim=head_dim, first=2)
    # dQ^T = K^T dS^T: A MN-major, one panel of K, in which columns past the head dim are zeros; B K-major.
    for depth, head_dim, first in ((64, 64, 0), (128, 128, 0), (128, 128, 1), (128, 72, 1)):
        op = Wgmma("bf16", 80, "shared", b_transposed=False, a_transposed=True)
        yield _wgmma(op, 128, depth, head_dim=head_dim, first=first)
    # dV^T += dO^T P: both MN-major, a panel of dO.
    yield _wgmma(Wgmma("bf16", 96, "shared", b_transposed=True, a_transposed=True), 128, 64, head_dim=64)


# mma.sync, ldmatrix, cp.async -----------------------------------------------------------------------------------------


def _mma(dtype: str, b: str, span: int, rows: int) -> Probe:
    """`b` says how B is stored; of A the first `rows` rows of 16 exist."""
    n = span // 2
    shift, mask = SWIZZLES[span]
    params = {"a": "void const*", "b": "void const*", "d": "float*", "valid_rows": "int"}
    k = _k(params, dtype=dtype, b=b, span=span, swizzle_shift=shift, swizzle_mask=mask)

    def case() -> tuple[Values, Values]:
        left, right = integers(16, n), integers(n, n, seed=1)
        tensors = [x.to(DTYPES[dtype]) for x in (left[:rows].clone(), right)]
        left[rows:] = 0
        product = left @ (right.T if b == "nk" else right)
        return [*tensors, torch.full((16, n), torch.nan)], [*tensors, product.float()]

    loads = {"nk": "ldmatrix_x4", "kn": "ldmatrix_x4_trans", "kn by halves": "ldmatrix_x2_trans"}
    forms = {f"{name}, {span}-byte rows" for name in ("ldmatrix_x4", loads[b], "cp_async_16")}
    return Probe(
        name=f"mma_{dtype}_{b.replace(' ', '_')}_z{span}_r{rows}",
        template="mma",
        k=k,
        maps=(),
        values={"a": 0, "b": 1, "d": 2, "valid_rows": rows},
        case=case,
        num_threads=32,
        shared_bytes=(16 + n) * span,
        forms=frozenset(forms | {f"mma_m16n8k16, {dtype}"}),
        arch="sm80",
    )


# stmatrix -------------------------------------------------------------------------------------------------------------


def _store(span: int, head_dim: int, rows: int) -> Probe:
    """16 rows by stmatrix and TMA, into a tensor of which `rows` exist behind the first 4."""
    tile, first_row = Panels(16, head_dim, span), 4
    shift, mask = SWIZZLES[span]
    k = _k({"first_row": "int"}, dtype="fp16", tile=tile, swizzle_shift=shift, swizzle_mask=mask)

    def case() -> tuple[Values, Values]:
        before = torch.full((1, first_row + rows, 1, head_dim), -1.0, dtype=torch.float16)
        row, column = grid(rows, head_dim)
        after = before.clone()
        after[0, first_row:, 0] = ((row * 17 + column) % 251).half()
        return [before], [after]

    names = (*(("stmatrix_x4",) if head_dim >= 16 else ()), *(("stmatrix_x2",) if head_dim % 16 else ()))
    return Probe(
        name=f"store_z{span}_d{head_dim}_r{rows}",
        template="store",
        k=k,
        maps=((16, span // 2, span, 0),),
        values={"first_row": first_row},
        case=case,
        num_threads=32,
        shared_bytes=tile.bytes,
        forms=frozenset(f"{name}, {span}-byte rows" for name in names),
    )


def _stage(dtype: str, queries: int) -> Probe:
    """Accumulators of a warpgroup, [key][query], into [query][key] rows."""
    k = _k({"image": "void*"}, dtype=dtype, queries=queries)

    def case() -> tuple[Values, Values]:
        query, key = grid(queries, 64)
        rows = ((key * 17 + query) % 251).to(DTYPES[dtype])
        return [torch.full((queries * 64,), torch.nan, dtype=rows.dtype)], [image(rows, 128)]

    return Probe(
        name=f"stage_{dtype}_m{queries}",
        template="stage",
        k=k,
        maps=(),
        values={"image": 0},
        case=case,
        num_threads=128,
        shared_bytes=128 * queries,
        forms=frozenset({"stmatrix_x4_trans, 128-byte rows"}),
    )


# TMA ------------------------------------------------------------------------------------------------------------------


def box_form(direction: str, rows: int, columns: int, span: int) -> str:
    return f"tma_{direction} of {rows} rows of {columns} columns, {span}-byte swizzle"


def _box(direction: str, rows: int, columns: int, span: int) -> Probe:
    """Two boxes side by side, at the end of the rows and of the head dim: behind, zeros are read, nothing written.

    What lies beside the rows of a narrow box in shared memory stays as it was.
    """
    row, head, batch = 9, 1, 1
    head_dim, seqlen = columns + 8, row + rows - 4
    numbers = ("row", "head", "batch", "tile_bytes", "box_bytes", "box_columns")
    k = _k({"image": "void*" if direction == "load" else "void const*", **dict.fromkeys(numbers, "int")}, dtype="fp16")

    def case() -> tuple[Values, Values]:
        tensor = integers(2, seqlen, 3, head_dim, most=2000).half()
        boxes = torch.zeros(2, rows, span // 2, dtype=torch.float16)
        there = tensor[batch, row:, head]
        boxes[0, : rows - 4, :columns] = there[:, :columns]
        boxes[1, : rows - 4, :8] = there[:, columns:]
        laid_out = image(boxes.flatten(0, 1), span)
        if direction == "load":
            return [tensor, torch.full_like(laid_out, torch.nan)], [tensor, laid_out]
        before = torch.full_like(tensor, -1.0)
        after = before.clone()
        after[batch, row:, head] = there
        # What lies behind the ends must not arrive: let it be NaN, not zeros.
        boxes[:, rows - 4 :] = torch.nan
        boxes[1, :, 8:] = torch.nan
        dirty = image(boxes.flatten(0, 1), span)
        return [before, dirty], [after, dirty]

    return Probe(
        name=f"box_{direction}_r{rows}_c{columns}_z{span}",
        template=f"box_{direction}",
        k=k,
        maps=((rows, columns, span, 0),),
        values={
            "image": 1,
            "row": row,
            "head": head,
            "batch": batch,
            "tile_bytes": rows * span,
            "box_bytes": rows * columns * 2,
            "box_columns": columns,
        },
        case=case,
        num_threads=32,
        shared_bytes=2 * rows * span + 16,
        forms=frozenset({box_form(direction, rows, columns, span)}),
    )


def _bulk() -> Probe:
    names = ("source", "from_registers", "one_by_one", "from_shared", "stored")
    k = _k({name: "float const*" if name == "source" else "float*" for name in names})

    def case() -> tuple[Values, Values]:
        numbers, sums = integers(128, most=1000).float(), integers(128, seed=1, most=1000).float()
        pairs = numbers.view(16, 2, 4).sum(1).flatten()
        some = sums[:64]
        before = [numbers, some.clone(), some.clone(), sums, torch.zeros(128)]
        return before, [numbers, some + pairs, some + pairs, sums + 2 * numbers, numbers]

    return Probe(
        name="bulk",
        template="bulk",
        k=k,
        maps=(),
        values={name: number for number, name in enumerate(names)},
        case=case,
        num_threads=32,
        shared_bytes=1040,
        forms=frozenset(
            {"bulk_load", "bulk_store", "bulk_reduce_add", "reduce_add_global_float4", "reduce_add_global_float"}
        ),
    )


# What the templates use -----------------------------------------------------------------------------------------------

_WITH_ROWS = re.compile(r"\b(ldmatrix_x\w+|stmatrix_x\w+|cp_async_16)\(")
_WITH_DTYPE = re.compile(r"\b(mma_m\w+)\(")
_PLAIN = re.compile(r"\b(bulk_\w+|reduce_add_global\w+)\(")
_STORED = ("o", "dk", "dv", "dq")  # tensors that a kernel's TMA writes


@functools.cache
def plans() -> tuple[KernelPlan, ...]:
    """The catalogue, what was tuned, every default, and every width of panels that a tiling may have."""
    names = [row.kernel for rows in tuned_rows().values() for row in rows]
    specs = [*catalogue(), *(KernelSpec.from_name(name) for name in names)]
    for arch, direction in itertools.product(("sm80", "sm90"), ("fwd", "bwd")):
        for number, head_dim in enumerate(range(8, 257, 8)):
            dtype, mask = (("bf16", "causal"), ("fp16", "full"))[number % 2]
            problem = Problem(direction=direction, head_dim=head_dim, dtype=dtype, mask=mask)
            specs.append(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
        for head_dim in (64, 72, 128):
            problem = Problem(direction=direction, head_dim=head_dim)
            kinds = {tiling.swizzle_bytes: tiling for tiling in feasible_tilings(problem, arch)}
            specs += [KernelSpec(problem=problem, tiling=tiling) for tiling in kinds.values()]
    return tuple(make_plan(spec) for spec in dict.fromkeys(specs))


@functools.cache
def used_forms() -> Mapping[str, str]:
    """Each form of operand that some kernel's instructions have, and the name of one such kernel."""
    return {form: plan.name for plan in reversed(plans()) for form in _forms(plan)}


def _forms(plan: KernelPlan) -> Iterator[str]:
    span = plan.tiling.swizzle_bytes
    text = _rendered(plan)
    yield from (f"{name}, {span}-byte rows" for name in _WITH_ROWS.findall(text))
    yield from (f"{name}, {plan.dtype}" for name in _WITH_DTYPE.findall(text))
    yield from _PLAIN.findall(text)
    for n, source_of_a, a_major, b_major in re.findall(r"\bwgmma_m64n(\d+)k16_(ss|rs)_([km])([km])\(", text):
        op = Wgmma(plan.dtype, int(n), "shared" if source_of_a == "ss" else "registers", b_major == "m", a_major == "m")
        # Both K-major: products over the head dim. Else over a block of queries or keys, whole steps of both.
        yield wgmma_form(op, plan.tile_n if "m" in (a_major, b_major) else plan.head_dim, span)
        yield f"wgmma {plan.dtype}"
    yield from (box_form(*box) for box in _boxes_of(plan))


def _boxes_of(plan: KernelPlan) -> Iterator[tuple[str, int, int, int]]:
    """(load or store, rows, columns, bytes of a panel's row) of each tensor map."""
    for entry in plan.entry_points:
        for box in entry.tensor_maps:
            direction = "store" if box.name in _STORED else "load"
            yield direction, box.box_rows, box.box_cols, box.swizzle_bytes


def _rendered(plan: KernelPlan) -> str:
    return "\n".join(line.partition("//")[0] for line in render(plan).source.splitlines())


@functools.cache
def probes() -> tuple[Probe, ...]:
    """All of them; names are unique."""
    return (
        *_wgmma_probes(),
        *(
            _mma(dtype, b, span, rows)
            for span in (128, 64, 32)
            for b in ("nk", "kn", "kn by halves")
            for dtype, rows in (("bf16", 16), ("fp16", 11))
        ),
        *(_store(span, head_dim, rows) for span in (128, 64, 32) for head_dim in (8, 72, 128) for rows in (16, 9)),
        *(_stage(dtype, queries) for dtype, queries in (("bf16", 64), ("fp16", 80), ("bf16", 128))),
        # Of every plan: the text of these is the same, and the boxes are data.
        *(_box(*box) for box in sorted({box for plan in plans() for box in _boxes_of(plan)})),
        _bulk(),
    )
