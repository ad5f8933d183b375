"""The machine is the one that the PTX manual describes: each form of operand that the templates use, on small integers.

Sums of small integers are exact in any order, so results are compared for equality. The probes in probes/ use only
primitives of templates/ptx/: rendered with target="cuda" they ask the same of a GPU.
"""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fa2gen.host import KernelFault
from fa2gen.host.build import build_source
from fa2gen.host.forward import SHARED_BASE, tensor_map, view_of
from fa2gen.host.run import Argument, Job, run
from fa2gen.layout import Panels, align_up
from fa2gen.plan import TensorMapPlan, make_plan
from fa2gen.ptx import Wgmma
from fa2gen.render import Rendered, _environment, _strip_marks, render
from fa2gen.spec import KernelSpec, Tiling

PROBES = Path(__file__).parent / "probes"
SWIZZLE_MODES = {128: 1, 64: 2, 32: 3}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def probe_source(name, k, target="host"):
    """A probe's text for either compiler; `k` is what it is rendered with."""
    text = (PROBES / f"{name}.cu.j2").read_text(encoding="utf-8")
    return _strip_marks(_environment(target).from_string(text).render(k=k))


def run_probe(name, k, arguments, tensors, num_threads, **options):
    """`arguments` are tensor indices (pointers), (TensorMapPlan, index) or bytes."""
    views = [view_of(str(i), x) for i, x in enumerate(tensors)]
    packed = []
    for argument in arguments:
        if isinstance(argument, bytes):
            packed.append(Argument(argument, ()))
        elif isinstance(argument, int):
            packed.append(Argument(bytes(8), ((0, argument, 0),)))
        else:
            packed.append(tensor_map(argument[0], views[argument[1]], argument[1]))
    job = Job((1, 1, 1), num_threads, SHARED_BASE, k.shared_bytes, True, tuple(packed), **options)
    memories = [view.memory(str(i)) for i, view in enumerate(views)]
    return run(build_source("probe", probe_source(name, k)), job, memories)


def integers(*shape, seed=0, most=3):
    return torch.from_numpy(np.random.default_rng(seed).integers(-most, most + 1, shape))


def probe_k(**values):
    """What the primitives look at: the default of every switch, and `values`."""
    return SimpleNamespace(tiling=Tiling(arch="sm90", tile_m=64, tile_n=64, num_mma_warps=4), **values)


WGMMA = [
    # span, n, depth: one panel and several, whole and partly filled ones
    *((span, 64, depth) for span in (128, 64, 32) for depth in (16, 64, 128)),
    *((span, 80, depth) for span in (128, 64, 32) for depth in (72, 40)),
    (128, 8, 64),
    (128, 256, 64),
]


@pytest.mark.parametrize(("span", "n", "depth"), WGMMA)
def test_wgmma_of_k_major_operands(span, n, depth):
    """S = Q K^T: both K-major; a depth that does not fill its last step or panel is filled with zeros by TMA."""
    a_tile, b_tile = Panels(64, depth, span), Panels(n, depth, span)
    a, b = integers(64, depth), integers(n, depth, seed=1)
    d = wgmma(a_tile, b_tile, a, b, Wgmma("bf16", n, "shared", b_transposed=False), depth)
    assert torch.equal(d, (a @ b.T).float())


@pytest.mark.parametrize(("span", "n"), [(span, n) for span in (128, 64, 32) for n in (16, 72, 128)] + [(128, 256)])
@pytest.mark.parametrize(("a_from", "dtype"), (("shared", "bf16"), ("registers", "fp16")))
def test_wgmma_of_mn_major_b(span, n, a_from, dtype):
    """O = P V: B lies as [k][n], MN-major; A in shared memory, or in the registers of its fragment."""
    depth = 64
    a_tile, b_tile = Panels(64, depth, span), Panels(depth, n, span)
    a, b = integers(64, depth), integers(depth, n, seed=1)
    if a_from == "registers":
        row, column = torch.meshgrid(torch.arange(64), torch.arange(depth), indexing="ij")
        a = (row * 7 + column * 3) % 5 - 2
    d = wgmma(a_tile, b_tile, a, b, Wgmma(dtype, n, a_from, b_transposed=True), depth)
    assert torch.equal(d, (a @ b).float())


def wgmma(a_tile, b_tile, a, b, op, depth):
    span = a_tile.span
    smem_b = align_up(a_tile.bytes, 1024)
    smem_barrier = smem_b + align_up(b_tile.bytes, 1024)
    k = probe_k(
        dtype=op.dtype,
        op=op,
        a=a_tile,
        b=b_tile,
        smem_b=smem_b,
        smem_barrier=smem_barrier,
        shared_bytes=smem_barrier + 16,
        steps=align_up(depth, 16) // 16,
        steps_per_panel=span // 32,
        desc_hi=SWIZZLE_MODES[span] << 30 | 8 * span >> 4,
    )
    d = torch.full((64, op.n), float("nan"))
    tensors = [x.to(DTYPES[op.dtype])[None, :, None, :].contiguous() for x in (a, b)]
    maps = [
        (TensorMapPlan(name, tile.columns, tile.rows, span), i)
        for i, (name, tile) in enumerate((("a", a_tile), ("b", b_tile)))
    ]
    run_probe("wgmma", k, [*maps, 2], [*tensors, d], 128)
    return d


@pytest.mark.parametrize(
    ("span", "head_dim"), [(span, head_dim) for span in (128, 64, 32) for head_dim in (8, 72, 128)]
)
@pytest.mark.parametrize("rows", (16, 9))
def test_stmatrix_and_a_store_that_is_clipped(span, head_dim, rows):
    tile = Panels(16, head_dim, span)
    shift, mask = {128: (0, 7), 64: (1, 3), 32: (2, 1)}[span]
    first_row = 4
    k = probe_k(
        dtype="fp16", tile=tile, swizzle_shift=shift, swizzle_mask=mask, first_row=first_row, shared_bytes=tile.bytes
    )
    out = torch.full((1, first_row + rows, 1, head_dim), -1.0, dtype=torch.float16)
    run_probe("store", k, [(TensorMapPlan("o", tile.columns, 16, span), 0)], [out], 32)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(head_dim), indexing="ij")
    assert torch.equal(out[0, first_row:, 0].float(), ((row * 17 + column) % 251).float())
    assert bool((out[0, :first_row] == -1).all())


@pytest.mark.parametrize("b_stored_as", ("nk", "kn", "kn by halves"))
@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("rows", (16, 11))
def test_mma_sync(b_stored_as, dtype, rows):
    """cp.async with zero fill, ldmatrix plain and transposed, mma.sync's fragments."""
    a, b = integers(16, 16), integers(16, 16, seed=1)
    k = probe_k(dtype=dtype, b=b_stored_as, shared_bytes=1024)
    d = torch.full((16, 16), float("nan"))
    tensors = [x.to(DTYPES[dtype]) for x in (a[:rows].clone(), b)]
    run_probe("mma", k, [0, 1, 2, struct.pack("<i", rows)], [*tensors, d], 32)
    a[rows:] = 0
    assert torch.equal(d, (a @ (b.T if b_stored_as == "nk" else b)).float())


@pytest.mark.parametrize("kernel", ("sm90", "sm80"))
def test_swizzles_are_free_of_conflicts_and_without_them_they_are_not(host, kernel):
    """The counters see what a swizzle is for: 8 rows of a column of chunks in 8 groups of banks."""
    name = {
        "sm90": "fa2_fwd_sm90_bf16_d128_causal_m128_n64_s2_w8",
        "sm80": "fa2_fwd_sm80_bf16_d128_causal_m64_n64_s1_w4",
    }[kernel]
    sizes = (1, 64, 64, 1, 1)
    primitives = {"sm90": ("stmatrix",), "sm80": ("ldmatrix",)}[kernel]
    _, report, *_ = host.run(name, sizes, stats=True)
    for primitive in primitives:
        assert report.counts[primitive].wavefronts == report.counts[primitive].ideal_wavefronts > 0
    if kernel == "sm80":
        rendered = render(make_plan(KernelSpec.from_name(name)), target="host")
        plain = Rendered(rendered.source.replace("kSwizzleMask = 7;", "kSwizzleMask = 0;"), rendered.origins)
        verdict, report, *_ = host.run(name, sizes, stats=True, rendered=plain)
        assert verdict.ok
        assert report.counts["ldmatrix"].wavefronts == 8 * report.counts["ldmatrix"].ideal_wavefronts


def test_a_message_names_the_template_line_and_the_seed(host):
    name = "fa2_fwd_sm90_bf16_d128_causal_m128_n64_s2_w8"
    rendered = render(make_plan(KernelSpec.from_name(name)), target="host")
    deaf = Rendered(
        rendered.source.replace("mbarrier_arrive_if(barriers.v_empty(v_state.stage), leader);", ""), rendered.origins
    )
    with pytest.raises(KernelFault) as caught:
        host.run(name, (1, 300, 400, 1, 1), rendered=deaf, seed=5)
    message = str(caught.value)
    assert "deadlock" in message and "parity" in message and "[sm90/" in message and "replay with seed=5" in message
    with pytest.raises(KernelFault) as again:
        host.run(name, (1, 300, 400, 1, 1), rendered=deaf, seed=5)
    assert str(again.value) == message
