"""What `fa2gen.kernel` asks of the driver. Run by test_launch.py, in a process whose libcuda.so.1 is fake_libcuda.c."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
import threading

import pytest

from fa2gen.arch import ARCHES
from fa2gen.errors import Fa2GenError, UnsupportedProblem
from fa2gen.features import examples_of
from fa2gen.kernel import Kernel, argument_sizes, zeroed_memory
from fa2gen.launch import launch_of
from fa2gen.layout import align_up
from fa2gen.options import Shape
from fa2gen.plan import make_plan, recipe
from fa2gen.select import default_tiling
from fa2gen.spec import KernelSpec, Problem
from tests.launcher import Tensor, build, call_type, cuda_include

CUBIN = b"\x7fELF" + bytes(60)
SHAPE = Shape(batch=2, seqlen_q=300, seqlen_k=200, num_heads=4, num_heads_kv=2)
SCALE = 0.125
ADDRESSES = {"q": 0x7F0000010000, "k": 0x20000, "v": 0x30000, "o": 0x40000, "lse": 0x50000, "tile_counter": 0x60000}
U64, U32, I32 = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int32

fake = ctypes.CDLL("libcuda.so.1")


MAX_ARGUMENTS = 12  # fake_libcuda.c's


def scaled(plan, softmax_scale):
    """The options of a typical call of a plan, with another scale."""
    return examples_of(plan.problem)[0]._replace(softmax_scale=softmax_scale)


class Launch(ctypes.Structure):
    _fields_ = (
        *((name, U64) for name in ("count", "function", "stream")),
        *(("grid", U32 * 3), ("block", U32 * 3), ("shared_bytes", U32), ("misaligned", U32)),
        ("starts_early", U32),
        ("arguments", (ctypes.c_uint8 * 512) * MAX_ARGUMENTS),
    )


class Map(ctypes.Structure):
    _fields_ = (
        *(("address", U64), ("sizes", U64 * 5), ("strides", U64 * 4), ("box", U32 * 5)),
        *((name, I32) for name in ("data_type", "rank", "swizzle", "l2_promotion")),
    )


launched = Launch.in_dll(fake, "fake_launch")
encodes = U64.in_dll(fake, "fake_encodes")


def set_result(name, value):
    I32.in_dll(fake, name).value = value


@pytest.fixture(autouse=True)
def reset():
    ctypes.memset(ctypes.byref(launched), 0, ctypes.sizeof(launched))
    encodes.value = 0
    set_result("fake_launch_result", 0)
    set_result("fake_encode_result", 0)
    for name in ("fake_launches_before_failure", "fake_encodes_before_failure"):
        U32.in_dll(fake, name).value = 0


def make(arch, head_dim=64, mask="causal", dtype="bf16", head_dim_v=None):
    problem = Problem(head_dim=head_dim, head_dim_v=head_dim_v, mask=mask, dtype=dtype)
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
    U32.in_dll(fake, "fake_num_arguments").value = len(argument_sizes(plan))
    ((U32 * MAX_ARGUMENTS).in_dll(fake, "fake_argument_sizes"))[: len(argument_sizes(plan))] = argument_sizes(plan)
    return Kernel(plan, CUBIN, 0)


def strides(seqlen, heads, head_dim):
    return seqlen * heads * head_dim, heads * head_dim, head_dim


def prepare(kernel, shape=SHAPE, **changes):
    d = kernel.plan.head_dim
    q, kv = strides(shape.seqlen_q, shape.num_heads, d), strides(shape.seqlen_k, shape.num_heads_kv, d)
    return kernel.prepare(shape, {"q": q, "k": kv, "v": kv, "o": q, **changes}, scaled(kernel.plan, SCALE))


def call(launch, addresses, stream=0):
    """A launch with addresses by name."""
    operands = tuple(addresses[operand.name] for operand in launch.kernel.plan.operands)
    launch(operands, addresses.get("scratch", addresses.get("tile_counter", 0)), stream)


def params(plan):
    """The Params that the last launch was given, by name."""
    raw = bytes(launched.arguments[len(plan.tensor_maps)])[: struct.calcsize(plan.params_format)]
    return dict(zip((param.name for param in plan.params), struct.unpack(plan.params_format, raw), strict=True))


def tensor_maps(plan):
    return {
        m.argument.removeprefix("map_"): Map.from_buffer_copy(launched.arguments[i])
        for i, m in enumerate(plan.tensor_maps)
    }


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("arch", list(ARCHES))
def test_one_launch(arch, mask):
    kernel = make(arch, mask=mask)
    plan = kernel.plan
    call(prepare(kernel), ADDRESSES, 0x77)
    m_blocks = -(-300 // plan.tile_m)
    assert launched.count == 1 and launched.stream == 0x77 and launched.function == 0x4000
    assert launched.misaligned == 0 and not launched.starts_early
    assert tuple(launched.block) == (plan.num_threads, 1, 1)
    assert launched.shared_bytes == plan.shared_memory_bytes == I32.in_dll(fake, "fake_shared_limit").value
    assert tuple(launched.grid) == ((min(132, m_blocks * 8), 1, 1) if arch == "sm90" else (m_blocks, 4, 2))
    expected = ADDRESSES | {
        "seqlen_q": 300,
        "seqlen_k": 200,
        "num_heads": 4,
        "num_heads_per_kv": 2,
        "num_m_blocks": m_blocks,
        "num_tiles": m_blocks * 8,
        "num_batch_heads": 8,
        "softmax_scale": SCALE,
        "softmax_scale_log2": pytest.approx(SCALE * math.log2(math.e), rel=1e-6),
        "q_batch_stride": 300 * 4 * 64,
        "q_row_stride": 4 * 64,
        "q_head_stride": 64,
        "k_batch_stride": 200 * 2 * 64,
        "v_row_stride": 2 * 64,
        "o_batch_stride": 300 * 4 * 64,
    }
    for name, value in params(plan).items():
        if name in expected:
            assert value == expected[name], name


@pytest.mark.parametrize(("dtype", "code"), [("fp16", 6), ("bf16", 9)])
def test_tensor_maps(dtype, code):
    kernel = make("sm90", head_dim=96, dtype=dtype)
    packed = (200 * 3 * 2 * 96, 3 * 2 * 96, 96)  # k and v are slices of a (batch, seqlen, 3, heads, head_dim)
    call(prepare(kernel, k=packed, v=packed), ADDRESSES)
    maps = tensor_maps(kernel.plan)
    assert [*maps] == ["q", "k", "k_last", "v", "v_last", "o"]  # head dim 96 has a second panel of 32 columns
    for planned, found in zip(kernel.plan.tensor_maps, maps.values(), strict=True):
        seqlen, heads = (300, 4) if planned.name in ("q", "o") else (200, 2)
        assert found.address == ADDRESSES[planned.name]
        assert tuple(found.sizes)[:4] == (96, seqlen, heads, 2)
        batch, row, head = strides(seqlen, heads, 96) if planned.name in ("q", "o") else packed
        assert tuple(found.strides)[:3] == (row * 2, head * 2, batch * 2)
        assert tuple(found.box)[:4] == (planned.box_cols, planned.box_rows, 1, 1)
        assert (found.data_type, found.rank, found.l2_promotion) == (code, 4, 3)
        assert found.swizzle == {32: 1, 64: 2, 128: 3}[planned.swizzle_bytes]


def test_dimensions_of_one_element_get_a_valid_stride():
    shape = Shape(1, 1, 200, 1, 1)
    call(prepare(make("sm90"), shape, q=(3, 5, 7), o=(1, 1, 1)), ADDRESSES)
    for name in ("q", "o"):
        assert all(step and step % 16 == 0 for step in tensor_maps(make("sm90").plan)[name].strides[:3])


def test_only_new_addresses_are_encoded():
    launch = prepare(make("sm90"))
    call(launch, ADDRESSES)
    assert encodes.value == 4
    call(launch, ADDRESSES)
    call(launch, {**ADDRESSES, "lse": 0x51000, "tile_counter": 0x61000})
    assert encodes.value == 4
    other = {**ADDRESSES, "o": 0x41000}
    for _ in range(3):
        for addresses in (other, ADDRESSES):
            call(launch, addresses)
            assert tensor_maps(launch.kernel.plan)["o"].address == addresses["o"]
    assert encodes.value == 5 and launched.misaligned == 0


@pytest.mark.parametrize("arch", list(ARCHES))
def test_each_launch_has_its_own_addresses(arch):
    """Every address moves by itself, and back: nothing of the launch before may be left."""
    launch = prepare(make(arch))
    plan = launch.kernel.plan
    given = {param.name for param in plan.params} | {tensor_map.name for tensor_map in plan.tensor_maps}
    for name in (*ADDRESSES, *ADDRESSES):
        for addresses in ({**ADDRESSES, name: 0x99000}, ADDRESSES, ADDRESSES):
            call(launch, addresses)
            found = {tensor_map: found.address for tensor_map, found in tensor_maps(plan).items()}
            found |= {param: value for param, value in params(plan).items() if param in ADDRESSES}
            assert found == {name: at for name, at in addresses.items() if name in given}


@pytest.mark.parametrize("arch", list(ARCHES))
def test_launches_of_a_kernel_take_turns(arch):
    """Of other sizes and strides, at the same addresses and at others: nothing of one is left in the next."""
    kernel = make(arch)
    shapes = [Shape(2, n, m, 4, 2) for n, m in ((300, 200), (300, 900), (1, 200), (77, 77))]
    launches = [(shape, prepare(kernel, shape)) for shape in shapes]
    for shape, launch in (*launches, *launches, *reversed(launches)):
        for addresses in (ADDRESSES, {**ADDRESSES, "k": 0x99000, "lse": 0x88000}, ADDRESSES):
            call(launch, addresses)
            values = params(kernel.plan)
            assert (values["seqlen_q"], values["seqlen_k"]) == (shape.seqlen_q, shape.seqlen_k)
            assert values["num_m_blocks"] == -(-shape.seqlen_q // kernel.plan.tile_m)
            assert values["lse"] == addresses["lse"]
            for name, found in tensor_maps(kernel.plan).items():
                assert found.address == addresses[name]
                assert found.sizes[1] == (shape.seqlen_q if name in "qo" else shape.seqlen_k)
            if arch == "sm80":
                assert values["q_batch_stride"] == shape.seqlen_q * 4 * 64 and values["k"] == addresses["k"]


@pytest.mark.parametrize("refused", ["q", "k", "v", "o"])
@pytest.mark.parametrize("other", [False, True])
def test_the_launch_after_a_refused_one_has_its_own_addresses(refused, other):
    """The refused one, of the same sizes or others, has moved some maps already."""
    kernel = make("sm90")
    launch = prepare(kernel)
    another = prepare(kernel, SHAPE._replace(seqlen_q=500, seqlen_k=700)) if other else launch
    others = {name: at + 0x100000 for name, at in ADDRESSES.items()}
    call(another, others)
    call(launch, ADDRESSES)
    set_result("fake_encode_result", 1)
    U32.in_dll(fake, "fake_encodes_before_failure").value = "qkvo".index(refused)
    with pytest.raises(Fa2GenError, match=f"tensor map of {refused}"):
        call(another, {name: at + 0x100000 for name, at in others.items()})
    set_result("fake_encode_result", 0)
    call(launch, ADDRESSES)
    maps = tensor_maps(launch.kernel.plan)
    assert {name: found.address for name, found in maps.items()} == {name: ADDRESSES[name] for name in maps}
    assert {name: found.sizes[1] for name, found in maps.items()} == {"q": 300, "k": 200, "v": 200, "o": 300}
    assert params(kernel.plan)["seqlen_q"] == 300


def test_many_addresses():
    launch = prepare(make("sm90"))
    for i in [*range(1, 500), *range(1, 500)]:
        call(launch, {**ADDRESSES, "q": i * 4096})
        assert tensor_maps(launch.kernel.plan)["q"].address == i * 4096
    assert len(launch._encoded) <= 64


@pytest.mark.parametrize("arch", list(ARCHES))
def test_each_launch_has_its_own_grid_and_stream(arch):
    """They stand where the arguments do, which another launch, or the same on another stream, wrote last."""
    kernel = make(arch)
    launches = [prepare(kernel), prepare(kernel, SHAPE._replace(batch=1, seqlen_q=20))]
    grids = {}
    for number, stream in ((0, 0x77), (0, 0x88), (0, 0x77), (1, 0x77), (0, 0x77), (1, 0x88), (1, 0)) * 2:
        call(launches[number], ADDRESSES, stream)
        assert launched.stream == stream
        assert grids.setdefault(number, tuple(launched.grid)) == tuple(launched.grid)
    assert grids[0] != grids[1]


@pytest.mark.parametrize("arch", list(ARCHES))
def test_threads_do_not_mix_their_arguments(arch):
    """Between one thread's addresses and its launch no other thread may write its own."""
    kernel = make(arch)
    launches = [prepare(kernel, SHAPE._replace(seqlen_q=seqlen)) for seqlen in (300, 500)]
    mixed = []
    block, pick = kernel.block, kernel.block._pick

    def checking_pick(addresses):  # runs inside the lock, after the maps are set
        mixed.extend(addresses for found in block.maps if found.address.value != addresses[found.operand])
        return pick(addresses)

    block._pick = checking_pick

    def work(n):
        for i in range(300):
            call(launches[(n + i) % 2], {name: at + (n * 1000 + i) * 4096 for name, at in ADDRESSES.items()})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not mixed and launched.count == 1200


def test_a_thread_without_a_context_gets_one():
    U32.in_dll(fake, "fake_wrong_context_launches").value = 1
    call(prepare(make("sm90")), ADDRESSES)
    assert launched.count == 1


@pytest.mark.parametrize("arch", list(ARCHES))
def test_a_failing_launch_says_what_and_why(arch):
    launch = prepare(make(arch))
    set_result("fake_launch_result", 701)
    with pytest.raises(
        Fa2GenError, match=r"threads.*shared memory.*CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES.*as the test"
    ) as e:
        call(launch, ADDRESSES)
    assert launch.kernel.plan.name in str(e.value)


def test_a_tensor_map_that_is_refused_says_which():
    launch = prepare(make("sm90"))
    set_result("fake_encode_result", 1)
    for _ in range(2):  # a refused map must not be taken for encoded
        with pytest.raises(Fa2GenError, match=r"tensor map of q.*\(64, 300, 4, 2\).*CUDA_ERROR_INVALID_VALUE"):
            call(launch, ADDRESSES)
    assert launched.count == 0


def test_a_cubin_of_another_version_is_refused():
    plan = make("sm90").plan
    sizes = (U32 * MAX_ARGUMENTS).in_dll(fake, "fake_argument_sizes")
    sizes[4] += 8
    with pytest.raises(Fa2GenError, match="another version of fa2gen; build it again"):
        Kernel(plan, CUBIN, 0)


def test_what_does_not_load():
    plan = make("sm90").plan
    with pytest.raises(Fa2GenError, match=f"does not load {plan.name}"):
        Kernel(plan, b"not a cubin at all, but long enough to look at", 0)
    with pytest.raises(Fa2GenError, match="no CUDA device 7"):
        Kernel(plan, CUBIN, 7)


@pytest.mark.parametrize("arch", list(ARCHES))
def test_sizes_that_no_launch_can_hold(arch):
    kernel = make(arch)
    for sizes in ((2**22, 2**20, 8, 64, 64), (1, 2**31, 8, 1, 1), (1, 8, 2**31, 1, 1)):
        with pytest.raises(UnsupportedProblem, match=r"split|most"):
            prepare(kernel, Shape(*sizes))
    if arch == "sm80":  # batch and heads are the grid's y and z
        for sizes, word in (((70_000, 8, 8, 1, 1), "batch is 70,000"), ((1, 8, 8, 70_000, 1), "heads is 70,000")):
            with pytest.raises(UnsupportedProblem, match=f"{word}.*65,535"):
                prepare(kernel, Shape(*sizes))


def test_a_stride_that_no_tensor_map_can_hold():
    with pytest.raises(UnsupportedProblem, match=r"2\^40.*sm80"):
        prepare(make("sm90"), q=(2**40, 256, 64))


@pytest.mark.parametrize(("arch", "head_dim"), list(itertools.product(ARCHES, range(8, 257, 8))))
def test_every_head_dim_packs(arch, head_dim):
    call(prepare(make(arch, head_dim)), ADDRESSES)
    assert launched.count == 1 and launched.misaligned == 0


# Backward ------------------------------------------------------------------------------------------------------------

BACKWARD_ADDRESSES = {
    name: 0x7F0000000000 + 0x10000 * i
    for i, name in enumerate(("q", "k", "v", "o", "dout", "dq", "dk", "dv", "lse", "dlse", "scratch"))
}


def make_backward(head_dim, mask="causal", arch="sm90", deterministic=False, head_dim_v=None):
    problem = Problem(direction="bwd", head_dim=head_dim, head_dim_v=head_dim_v, mask=mask, deterministic=deterministic)
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
    for entry, sizes, count in zip(
        plan.entry_points,
        ("fake_sizes_before", "fake_argument_sizes", "fake_sizes_after"),
        ("fake_num_before", "fake_num_arguments", "fake_num_after"),
        strict=True,
    ):
        expected = argument_sizes(plan, entry)
        U32.in_dll(fake, count).value = len(expected)
        ((U32 * MAX_ARGUMENTS).in_dll(fake, sizes))[: len(expected)] = expected
    return Kernel(plan, CUBIN, 0)


def prepare_backward(kernel, shape=SHAPE, **changes):
    every = {}
    for d, of_query, of_key in (
        (kernel.plan.head_dim, ("q", "dq"), ("k", "dk")),
        (kernel.plan.head_dim_v, ("o", "dout"), ("v", "dv")),
    ):
        every |= dict.fromkeys(of_query, strides(shape.seqlen_q, shape.num_heads, d))
        every |= dict.fromkeys(of_key, strides(shape.seqlen_k, shape.num_heads_kv, d))
    return kernel.prepare(shape, every | changes, scaled(kernel.plan, SCALE))


@pytest.mark.parametrize(
    ("arch", "head_dim", "head_dim_v", "deterministic"),
    [
        *((arch, d, d, False) for arch, d in itertools.product(ARCHES, range(8, 257, 8))),
        *((arch, d, d, True) for arch, d in itertools.product(ARCHES, (64, 128, 256))),
        *((arch, *dims, False) for arch, dims in itertools.product(ARCHES, ((192, 128), (72, 8), (64, 256)))),
    ],
)
def test_one_backward(arch, head_dim, head_dim_v, deterministic):
    """Three launches, in order, each with its own maps and all with the same Params."""
    kernel = make_backward(head_dim, arch=arch, deterministic=deterministic, head_dim_v=head_dim_v)
    plan = kernel.plan
    launch = prepare_backward(kernel, dout=(7 * 2**20, 4096, 256))
    call(launch, BACKWARD_ADDRESSES, 0x77)
    assert launched.count == 3 and launched.misaligned == 0
    history = (Launch * 4).in_dll(fake, "fake_launches")
    m_blocks, n_blocks = -(-300 // plan.tile_m), -(-200 // plan.tile_n)
    scratch = BACKWARD_ADDRESSES["scratch"]
    statistics = 4 * m_blocks * plan.tile_m * 8
    assert launch.scratch_bytes >= 2 * statistics
    for i, (entry, function, blocks) in enumerate(
        zip(plan.entry_points, (0x4001, 0x4000, 0x4002), (m_blocks * 8, n_blocks * 4, m_blocks * 8), strict=True)
    ):
        one = history[i + 1]
        assert (one.function, one.stream, tuple(one.grid)) == (function, 0x77, (blocks, 1, 1))
        assert (tuple(one.block), one.shared_bytes) == ((entry.num_threads, 1, 1), entry.shared_memory_bytes)
        assert one.starts_early == (arch == "sm90" and i > 0)  # an instruction of sm_90
        for planned, raw in zip(entry.tensor_maps, one.arguments, strict=False):
            found = Map.from_buffer_copy(raw)
            of_query = planned.name in ("q", "dout", "dq")
            seqlen, heads = (300, 4) if of_query else (200, 2)
            assert found.address == BACKWARD_ADDRESSES[planned.name]
            d = head_dim_v if planned.name in ("v", "dout", "dv") else head_dim
            assert tuple(found.sizes)[:4] == (d, seqlen, heads, 2)
            batch, row, head = (7 * 2**20, 4096, 256) if planned.name == "dout" else strides(seqlen, heads, d)
            assert tuple(found.strides)[:3] == (row * 2, head * 2, batch * 2)
            assert tuple(found.box)[:4] == (planned.box_cols, planned.box_rows, 1, 1)
        raw = bytes(one.arguments[len(entry.tensor_maps)])[: struct.calcsize(plan.params_format)]
        values = dict(zip((param.name for param in plan.params), struct.unpack(plan.params_format, raw), strict=True))
        direct = [name for name in values if name in BACKWARD_ADDRESSES]  # what no tensor map points to
        mapped = {"q", "k", "v", "dq", "dk", "dv"} if arch == "sm90" else set()
        assert set(direct) == BACKWARD_ADDRESSES.keys() - {"scratch"} - mapped
        expected = {name: BACKWARD_ADDRESSES[name] for name in direct} | {
            "lse_log2": scratch,
            "dpsum": scratch + statistics,
            "dq_acc": scratch + 2 * statistics,
            "dout_row_stride": 4096,
            "o_row_stride": 4 * head_dim_v,
            "num_n_blocks": n_blocks,
            "num_heads_per_kv": 2,
        }
        if deterministic:
            expected["dq_turns"] = (
                scratch + launch.scratch_bytes - -(-4 * m_blocks * 8 * plan.num_dq_shares // 128) * 128
            )
        assert {name: values[name] for name in expected} == expected


def test_kernels_of_a_backward_in_turns_on_two_streams():
    """The stream of a launch that may start early lies in a struct that lives on."""
    first, second = (prepare_backward(make_backward(64), Shape(1, n, n, 2, 2)) for n in (100, 2000))
    history = (Launch * 4).in_dll(fake, "fake_launches")
    for i in range(8):
        backward, stream = ((first, 0x11), (second, 0x22), (first, 0x33))[i % 3]
        call(backward, BACKWARD_ADDRESSES, stream)
        latest = [history[(launched.count - behind) % 4] for behind in (2, 1, 0)]
        assert [one.stream for one in latest] == [stream] * 3
        assert [one.starts_early for one in latest] == [0, 1, 1]
        rows = 100 if backward is first else 2000
        assert latest[0].grid[0] == latest[2].grid[0] == 2 * -(-rows // backward.kernel.plan.tile_m)


def test_plain_launches_of_a_backward(monkeypatch):
    monkeypatch.setattr("fa2gen.plan.sm90_bwd.STARTS_EARLY", False)
    call(prepare_backward(make_backward(64)), BACKWARD_ADDRESSES)
    history = (Launch * 4).in_dll(fake, "fake_launches")
    assert [history[i].starts_early for i in (1, 2, 3)] == [0, 0, 0] and launched.count == 3


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_failing_launch_of_a_backward_says_which_and_why(refused):
    launch = prepare_backward(make_backward(64))
    plan = launch.kernel.plan
    U32.in_dll(fake, "fake_launches_before_failure").value = refused
    set_result("fake_launch_result", 701)
    with pytest.raises(Fa2GenError, match=r"threads.*CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES.*as the test") as e:
        call(launch, BACKWARD_ADDRESSES)
    entry = plan.entry_points[refused]
    assert str(e.value).startswith(f"{entry.symbol}: launch of (")
    assert f" x {entry.num_threads} threads with {entry.shared_memory_bytes:,} B" in str(e.value)
    assert launched.count == refused


def test_backward_of_another_version_is_refused():
    plan = make_backward(64).plan
    (U32 * MAX_ARGUMENTS).in_dll(fake, "fake_sizes_after")[1] += 8
    with pytest.raises(Fa2GenError, match=r"postprocess.*another version of fa2gen; build it again"):
        Kernel(plan, CUBIN, 0)


def test_backward_that_no_launch_can_hold():
    for sizes in ((2**22, 2**20, 8, 64, 64), (1, 2**31, 8, 1, 1), (1, 8, 2**31, 1, 1)):
        with pytest.raises(UnsupportedProblem, match="split"):
            prepare_backward(make_backward(64), Shape(*sizes))


# The C++ launcher ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(cuda_include() is None, reason="no cuda.h")
@pytest.mark.parametrize("arch", list(ARCHES))
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize(("mask", "head_dim_v"), [("causal", None), ("window", 136)])
def test_the_launcher_passes_what_the_package_does(tmp_path, arch, direction, mask, head_dim_v):
    """Grids, boxes, strides and Params, bit by bit; a tensor of one row or head may have any stride there too."""
    backward = direction == "bwd"
    if backward:
        kernel = make_backward(72, mask, arch, deterministic=True, head_dim_v=head_dim_v)
    else:
        kernel = make(arch, 72, mask, head_dim_v=head_dim_v)
    plan = kernel.plan
    options = scaled(plan, 0.3)
    numbers = options._asdict() | {"window_right": 0 if options.causal else options.window_right}
    numbers = {name: numbers[name] for name in recipe.options(plan)}
    door, call_of = build(plan, tmp_path), call_type(plan)
    history = (Launch * 4).in_dll(fake, "fake_launches")
    functions = (ctypes.c_void_p * len(plan.entry_points))(*((0x4001, 0x4000, 0x4002) if backward else (0x4000,)))

    def recorded():
        found = []
        for behind, entry in enumerate(reversed(plan.entry_points)):
            one = history[(launched.count - behind) % 4]
            sizes = argument_sizes(plan, entry)
            arguments = [bytes(raw)[:size] for raw, size in zip(one.arguments, sizes, strict=False)]
            found.append(
                (one.function, one.stream, *one.grid, *one.block, one.shared_bytes, one.starts_early, arguments)
            )
        return found

    for shape in (SHAPE, Shape(1, 1, 5000, 6, 1), Shape(3, 4097, 77, 2, 2)):
        rows_and_heads = {"query": (shape.seqlen_q, shape.num_heads), "key": (shape.seqlen_k, shape.num_heads_kv)}
        tensors_of = [x for x in plan.operands if x.of != "row"]
        of = {x.name: strides(*rows_and_heads[x.of], x.head_dim(plan.problem)) for x in tensors_of}
        given = BACKWARD_ADDRESSES if backward else {**ADDRESSES, "scratch": ADDRESSES["tile_counter"]}
        launch = kernel.prepare(shape, of, options)
        call(launch, given, 0x55)
        expected = recorded()
        at, places = given["scratch"], {}
        for name, count in launch_of(plan, shape, options, 132).scratch.items():
            places[name], at = at, at + 4 * count
        rows = {x.name: given[x.name] for x in plan.operands if x.of == "row"}
        tensors = {name: Tensor(given[name], *steps) for name, steps in of.items()}
        ctypes.memset(ctypes.byref(history), 0, ctypes.sizeof(history))
        one = call_of(**shape._asdict(), softmax_scale=0.3, **numbers, **tensors, **rows, **places)
        assert door(functions, 132, ctypes.byref(one), ctypes.c_void_p(0x55)) == 0
        assert recorded() == expected
    for wrong in (SHAPE._replace(batch=0), SHAPE._replace(num_heads=3), SHAPE._replace(seqlen_q=2**31)):
        before = launched.count
        assert door(functions, 132, ctypes.byref(call_of(**wrong._asdict())), None) == 1 and launched.count == before


FUNCTIONS = {"": "argument", "_preprocess": "before", "_postprocess": "after", "_prepare": "first"}
"""What ends the name of a kernel -> what fake_libcuda.c calls its sizes; their numbers are its functions'."""


@pytest.mark.skipif(cuda_include() is None, reason="no cuda.h")
@pytest.mark.parametrize(("arch", "direction"), [("sm90", "fwd"), ("sm90", "bwd"), ("sm80", "bwd")])
@pytest.mark.parametrize("mask", ["causal", "window"])
def test_the_launcher_of_ragged_batches(tmp_path, arch, direction, mask):
    """As above: maps of five dimensions, the lengths' addresses, and the kernel that comes first, if one does."""
    problem = Problem(direction=direction, head_dim=72, mask=mask, varlen=True)
    plan = make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))
    numbers = []
    for entry in plan.entry_points:
        numbers.append(list(FUNCTIONS).index(entry.symbol.removeprefix(plan.name)))
        kind = [*FUNCTIONS.values()][numbers[-1]]
        sizes = argument_sizes(plan, entry)
        U32.in_dll(fake, "fake_num_arguments" if kind == "argument" else f"fake_num_{kind}").value = len(sizes)
        of_kind = "fake_argument_sizes" if kind == "argument" else f"fake_sizes_{kind}"
        ((U32 * MAX_ARGUMENTS).in_dll(fake, of_kind))[: len(sizes)] = sizes
    kernel = Kernel(plan, CUBIN, 0)
    door, call_of = build(plan, tmp_path), call_type(plan)
    history = (Launch * 4).in_dll(fake, "fake_launches")
    functions = (ctypes.c_void_p * len(numbers))(*(0x4000 + number for number in numbers))
    options = scaled(plan, 0.3)
    said = options._asdict() | {"window_right": 0 if options.causal else options.window_right}

    def recorded(entries):
        found = []
        for behind, entry in enumerate(reversed(entries)):
            one = history[(launched.count - behind) % 4]
            sizes = argument_sizes(plan, entry)
            arguments = [bytes(raw)[:size] for raw, size in zip(one.arguments, sizes, strict=False)]
            found.append((one.function, *one.grid, *one.block, one.shared_bytes, one.starts_early, arguments))
        return found

    given = {operand.name: 0x7F0000000000 + 0x10000 * i for i, operand in enumerate(plan.operands)}
    given["seqused_q"] = 0
    for shape in (SHAPE, Shape(7, 4097, 77, 2, 2), Shape(64, 4097, 77, 2, 2)):
        q, kv = strides(shape.seqlen_q, shape.num_heads, 72), strides(shape.seqlen_k, shape.num_heads_kv, 72)
        of = {x.name: q if x.of == "query" else kv for x in plan.operands if x.is_tensor}
        launch = kernel.prepare(shape, of, options)
        scratch = 0x7E0000000000
        before, sizes = launched.count, launch_of(plan, shape, options, 132)
        launch(tuple(given[operand.name] for operand in plan.operands), scratch, 0x55, 0x7D0000000000)
        entries = [entry for entry, grid in zip(plan.entry_points, sizes.grids, strict=True) if 0 not in grid]
        assert launched.count - before == len(entries)
        assert len(entries) == len(plan.entry_points) - (shape.batch <= plan.own_sequences)
        expected = recorded(entries)
        at, places = scratch, {"tile_counter": 0x7D0000000000} if direction == "fwd" else {}
        for name, count in sizes.scratch.items():
            if name not in places:
                places[name], at = at, at + align_up(4 * count, 128)
        tensors = {name: Tensor(given[name], *steps) for name, steps in of.items()}
        others = {x.name: given[x.name] for x in plan.operands if not x.is_tensor}
        numbers_of_call = {name: said[name] for name in recipe.options(plan)}
        ctypes.memset(ctypes.byref(history), 0, ctypes.sizeof(history))
        one = call_of(**shape._asdict(), softmax_scale=0.3, **numbers_of_call, **tensors, **others, **places)
        assert door(functions, 132, ctypes.byref(one), ctypes.c_void_p(0x55)) == 0
        assert recorded(entries) == expected


# Memory --------------------------------------------------------------------------------------------------------------


def test_memory_of_a_stream():
    """Zeroed on the stream, while another may be captured; the thread's capture mode is as it was afterwards."""
    for _ in range(2):
        assert zeroed_memory(0, 65_552, 0x77) == 0x7F1200000000
        assert U64.in_dll(fake, "fake_allocated_bytes").value == 65_552
        assert U64.in_dll(fake, "fake_cleared_on").value == 0x77
        assert not U32.in_dll(fake, "fake_relaxed").value
    set_result("fake_launch_result", 2)
    with pytest.raises(Fa2GenError, match=r"65,552 B on device 0: CUDA_ERROR_OUT_OF_MEMORY"):
        zeroed_memory(0, 65_552, 0x77)
    assert not U32.in_dll(fake, "fake_relaxed").value
