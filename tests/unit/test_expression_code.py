"""What expressions become: derivatives, C++ for this machine, and which tiles are visited, against their definition."""

from __future__ import annotations

import ctypes
import functools
import math
import random
import re

import pytest
import sympy
import torch

from fa2gen.expression import Program, emit, evaluate, parse, split_window
from fa2gen.expression.evaluate import evaluate_tree
from fa2gen.expression.examples import EXAMPLES, Sizes
from fa2gen.expression.hoist import lowered
from fa2gen.expression.ranges import range_of
from fa2gen.expression.simplify import simplify
from fa2gen.expression.tree import Node, walk
from fa2gen.features import key_range
from fa2gen.features.expression import score_code
from fa2gen.options import Expression, Options
from tests.expressions import TYPES, inputs, random_condition, random_score
from tests.unit.test_launch_facts import compiled, needs_compiler

BATCH, HEADS, LENGTH = 2, 2, 24
SCALE = 0.37
SIZES = Sizes(BATCH, HEADS, LENGTH, LENGTH + 5)


def random_programs(count: int) -> list[Program]:
    """With a score and a mask each, of the same names with the same types."""
    rng = random.Random(5)
    found = []
    while len(found) < count:
        score, allow = random_score(rng), random_condition(rng)
        given = {name: type for name, type in TYPES.items() if name in score or name in allow}
        found.append(parse(score, allow, given))
    return found


def values_of(program: Program, made: dict) -> dict:
    """Names of the language over all of (batch, head, i, j), and the program's inputs."""
    shape = {
        "b": (BATCH, 1, 1, 1),
        "h": (1, HEADS, 1, 1),
        "i": (1, 1, SIZES.seqlen_q, 1),
        "j": (1, 1, 1, SIZES.seqlen_k),
    }
    places = {name: torch.arange(math.prod(sizes)).view(sizes) for name, sizes in shape.items()}
    lengths = {"seqlen_q": SIZES.seqlen_q, "seqlen_k": SIZES.seqlen_k}
    return places | {"hk": places["h"] // 2} | lengths | {given.name: made[given.name] for given in program.inputs}


def scores(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """s, some of them far out."""
    shape = (BATCH, HEADS, SIZES.seqlen_q, SIZES.seqlen_k)
    return (torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3).to(dtype)


def in_double(made: dict) -> dict:
    floats = {name: x.double() for name, x in made.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
    return made | floats


RANDOM = inputs(torch, BATCH, HEADS, LENGTH + 5)
CASES = [(program, RANDOM) for program in random_programs(100)]
CASES += [(parse(made.score, made.allow), made.inputs(torch, SIZES)) for made in EXAMPLES.values()]
FILTERED = "image[b, i] == image[b, j] and image[b, i] != 2 and image[b, j] < 9 and -1 <= image[b, j]"
CASES += [(parse(allow=FILTERED), EXAMPLES["images"].inputs(torch, SIZES))]
CASES += [(parse("s + i % ((h + 1) % 2)", "i // (seqlen_q // 99) <= j + 3"), RANDOM)]  # divisors of 0
DOCUMENTS = "document[b, i] == document[b, j]"  # beside a causal mask
CASES += [(parse(allow=DOCUMENTS), EXAMPLES["documents"].inputs(torch, SIZES))]


# Derivatives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "made"), CASES, ids=lambda x: getattr(x, "score", None))
def test_derivatives_are_those_of_autograd(program, made):
    """By s, by each number and by each tensor: what stands in the kernel's comment, and what its code is made from."""
    if not program.score:
        return
    s = scores().requires_grad_()
    values = values_of(program, in_double(made)) | {"s": s}
    for name in ("cap", "gain"):
        if name in values:
            values[name] = torch.tensor(values[name], dtype=torch.float64, requires_grad=True)
    tensors = {
        name: x.requires_grad_() for name, x in values.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    score = evaluate(program, "score", torch, values)
    weights = torch.randn(score.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names = list(tensors)
    truth = dict(
        zip(names, torch.autograd.grad((score * weights).sum(), [tensors[name] for name in names]), strict=True)
    )
    with torch.no_grad():
        slope = evaluate_tree(program.slope, values, torch).expand(score.shape)
        assert torch.allclose(slope * weights, truth["s"], rtol=1e-5, atol=1e-6), program.score
        found = {name: torch.zeros_like(x) for name, x in tensors.items() if name != "s"}
        for access in program.accesses:
            of_each = (evaluate_tree(access.derivative, values, torch) * weights).expand(score.shape)
            name = access.leaf.value
            places = [evaluate_tree(index, values, torch).expand(score.shape) for index in access.leaf.args]
            inside = tuple(
                place.clamp(0, size - 1).long() for place, size in zip(places, found[name].shape, strict=True)
            )
            (part,) = (x for x in program.gradients([access.token]) if x.access.leaf is access.leaf)
            of_part = evaluate_tree(part.factor, values, torch) * weights * (slope if part.of_s else 1.0)
            assert torch.allclose(of_part, of_each, rtol=1e-5, atol=1e-6), program.score
            found[name] = found[name].index_put(inside, of_each, accumulate=True) if inside else of_each.sum()
    for name, gradient in found.items():
        assert torch.allclose(gradient, truth[name], rtol=1e-5, atol=1e-5), f"{name} of {program.score}"


SMOOTH = [made for made, _ in CASES if made.score and not re.search("where|min|max|abs|%", made.score)]


@pytest.mark.parametrize("program", SMOOTH, ids=lambda program: program.score)
def test_derivatives_are_those_of_sympy(program):
    """As formulas, not at the places of one call alone."""
    s = sympy.Symbol("s", real=True)
    truth, found = sympy.diff(in_sympy(program.score_tree), s), in_sympy(program.slope)
    rng = random.Random(1)
    for _ in range(5):
        at = {symbol: rng.uniform(0.3, 2.5) for symbol in (truth + found + s).free_symbols}
        assert float(found.subs(at)) == pytest.approx(float(truth.subs(at)), rel=1e-6, abs=1e-6), program.score


def in_sympy(root: Node) -> sympy.Expr:
    """A tree of ours; a name, a number, and a tensor at each of its places, is a symbol."""
    operations = {
        "+": sympy.Add,
        "*": sympy.Mul,
        "/": lambda a, b: a / b,
        "recip": lambda a: 1 / a,
        "neg": lambda a: -a,
        "exp": sympy.exp,
        "log": sympy.log,
        "tanh": sympy.tanh,
        "sqrt": sympy.sqrt,
        "sigmoid": lambda a: 1 / (1 + sympy.exp(-a)),
        "float": lambda a: a,
    }
    made: dict[Node, sympy.Expr] = {}
    for node in walk(root):
        if node.op in operations:
            made[node] = operations[node.op](*(made[arg] for arg in node.args))
        elif node.op == "const":
            made[node] = sympy.Float(node.value) if node.type == "float" else sympy.Integer(node.value)
        else:
            made[node] = sympy.Symbol("_".join([node.value, *(str(made[arg]) for arg in node.args)]), real=True)
    return made[root]


# The kernel's own statements, on the CPU -----------------------------------------------------------------------------

_FUNCTIONS = """
#include <cmath>
using std::abs;
float tanh_approx(float x) { return std::tanh(x); }
float exp2_approx(float x) { return std::exp2(x); }
float log2_approx(float x) { return std::log2(x); }
float sqrt_approx(float x) { return std::sqrt(x); }
float reciprocal_approx(float x) { return 1.0f / x; }
float min_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmin(a, b); }
float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }
int floor_divide(int a, int b) { return a / b - (a % b < 0); }
int floor_modulo(int a, int b) { return a % b + (a % b < 0 ? b : 0); }
static int clamped(int index, int size) { return max(0, min(index, size - 1)); }
static int tile[4];
"""

_PROGRAM = """
namespace n%(index)d {
struct Params { float softmax_scale; %(fields)s };
%(loads)s
static void at(Params const& p, float acc, int b, int h, int i, int j, float* out) {
    int const hk = h / 2, seqlen_q = %(seqlen_q)d, seqlen_k = %(seqlen_k)d;
    float const float_i = i, float_j = j;
    (void)hk, (void)float_i, (void)float_j, (void)seqlen_q, (void)seqlen_k;
    { %(gradient)s
      out[0] = (%(score)s) * (%(factor)s);
      out[1] = %(weight)s; }
    { %(allow_lines)s
      out[2] = %(allow)s; }
}
}
extern "C" void run_%(index)d(void const* params, float const* scores, float* out) {
    n%(index)d::Params const& p = *static_cast<n%(index)d::Params const*>(params);
    for (int b = 0; b < %(batch)d; ++b) for (int h = 0; h < %(heads)d; ++h)
        for (int i = 0; i < %(seqlen_q)d; ++i) for (int j = 0; j < %(seqlen_k)d; ++j, ++scores, out += 3)
            n%(index)d::at(p, *scores / p.softmax_scale, b, h, i, j, out);
}
extern "C" int blocks_%(index)d(void const* params, int b, int h, int i0, int i1, int j0, int j1) {
    n%(index)d::Params const& p = *static_cast<n%(index)d::Params const*>(params);
    using namespace n%(index)d;
    int const hk = h / 2, seqlen_q = %(seqlen_q)d, seqlen_k = %(seqlen_k)d;
    tile[0] = i0, tile[1] = i1, tile[2] = j0, tile[3] = j1;
    (void)p, (void)hk, (void)seqlen_q, (void)seqlen_k;
    int found = 0;
    { %(block_lines)s
      found += (%(any)s ? 1 : 0) + (%(all)s ? 2 : 0) + (%(keys_alike)s ? 4 : 0) + (%(queries_alike)s ? 8 : 0); }
    return found;
}
"""
_CTYPES = {"float": "float", "int": "int", "bool": "bool"}
_COUNTS = {"above": ">", "below": "<", "not": "!="}


def text_of(index: int, program: Program) -> str:
    """C++ that runs a program at every place, and asks for the blocks of a tile."""
    fields, loads = "", ""
    for given in program.inputs:
        ctype = _CTYPES[given.type]
        if not given.is_tensor:
            fields += f"{ctype} {given.token}; "
            continue
        axes = range(given.rank)
        fields += f"{ctype} const* {given.token}; int {given.token}_sizes[4]; "
        place = "0"
        for axis in axes:
            place = f"({place}) * p.{given.token}_sizes[{axis}] + clamped(x{axis}, p.{given.token}_sizes[{axis}])"
        arguments = ", ".join(f"int x{axis}" for axis in axes)
        read = "int" if given.type == "bool" else ctype
        loads += f"{read} load_{given.token}(Params const& p, {arguments}) {{ return p.{given.token}[{place}]; }}\n"
        for bound in (bound for bound in program.tile_bounds if bound.token == given.token):
            others = "".join(f", int x{other}" for other in axes if other != bound.axis)
            passed = ", ".join("at" if other == bound.axis else f"x{other}" for other in axes)
            last = {"i": 1, "j": 3}[bound.side]
            counts = " && ".join(f"x {_COUNTS[word]} {number}" for word, number in bound.filters) or "true"
            for which, best, none in (("lowest", "min", "2147483647"), ("highest", "max", "-2147483647 - 1")):
                loads += (
                    f"int {which}_{bound.name}(Params const& p, int at{others}) {{ int const last = tile[{last}]; "
                    f"int found = {none}; for (; at <= last; ++at) {{ int const x = load_{given.token}(p, {passed}); "
                    f"if ({counts}) found = {best}(found, x); }} return found; }}\n"
                )
    gradient, allow, blocks = (emit(program, what) for what in ("gradient", "allow", "blocks"))

    def lines(code) -> str:
        return " ".join(line for level in code.levels.values() for line in level)

    for code in (gradient, allow, blocks):
        assert all(len(line) <= 118 for level in code.levels.values() for line in level), "a kernel's line has 128"
        assert all(len(result) <= 118 for result in code.results.values())
    named = {"gradient": lines(gradient), "allow_lines": lines(allow), "block_lines": lines(blocks)}
    sizes = {"batch": BATCH, "heads": HEADS, "seqlen_q": SIZES.seqlen_q, "seqlen_k": SIZES.seqlen_k}
    results = gradient.results | allow.results | blocks.results
    return _PROGRAM % {"index": index, "fields": fields, "loads": loads, **named, **sizes, **results}


@functools.cache
def library() -> ctypes.CDLL:
    """All programs in one: a compiler's start is dearer than they are."""
    return compiled(_FUNCTIONS + "".join(text_of(index, program) for index, (program, _) in enumerate(CASES)))


def params_of(program: Program, made: dict) -> tuple[ctypes.Structure, list]:
    """The program's Params, and what it points to."""
    fields, values, kept = [("softmax_scale", ctypes.c_float)], [SCALE], []
    for given in program.inputs:
        ctype = {"float": ctypes.c_float, "int": ctypes.c_int, "bool": ctypes.c_bool}[given.type]
        value = made[given.name]
        if given.is_tensor:
            dtype = {"float": torch.float32, "int": torch.int32, "bool": torch.bool}[given.type]
            kept.append(value.to(dtype).contiguous())
            fields += [(given.token, ctypes.c_void_p), (f"{given.token}_sizes", ctypes.c_int * 4)]
            values += [kept[-1].data_ptr(), (ctypes.c_int * 4)(*value.shape)]
        else:
            fields.append((given.token, ctype))
            values.append(value)
    made_type = type("Params", (ctypes.Structure,), {"_fields_": fields})
    return made_type(*values), kept


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{p.score}; {p.allow}" for p, _ in CASES])
def test_code_computes_what_is_written(index):
    """Score, weight and mask at every place, in fp32, against the text on tensors in fp64."""
    program, made = CASES[index]
    s = scores().float()
    params, kept = params_of(program, made)
    out = torch.empty(*s.shape, 3)
    library()[f"run_{index}"](ctypes.byref(params), ctypes.c_void_p(s.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    del kept
    truths = []
    for dtype in (torch.float64, torch.float32):
        leaf = s.to(dtype).requires_grad_()
        values = values_of(program, in_double(made) if dtype == torch.float64 else made) | {"s": leaf}
        score = evaluate(program, "score", torch, values)
        truths.append((score.detach().double(), torch.autograd.grad(score.sum(), leaf)[0].double()))
    for x, truth, pt in zip((out[..., 0].double() * math.log(2), out[..., 1].double()), *truths, strict=True):
        # Where fp32 decides otherwise than fp64 (the greater of two nearly equal numbers), either is right.
        error = torch.minimum((x - truth).abs(), (x - pt).abs())
        assert (error <= 2e-5 * (1 + truth.abs())).all(), f"{program.score}: {error.max()}"
    seen = evaluate(program, "allow", torch, values).expand(s.shape)
    assert (out[..., 2].bool() == seen).all(), program.allow


@needs_compiler
@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{p.allow}" for p, _ in CASES])
def test_no_tile_is_skipped_or_left_unmasked_that_must_not_be(index):
    """The kernel's own decision, tile by tile, against every place of the tile."""
    program, made = CASES[index]
    if not program.allow:
        return
    params, kept = params_of(program, made)
    shape = (BATCH, HEADS, SIZES.seqlen_q, SIZES.seqlen_k)
    seen = evaluate(program, "allow", torch, values_of(program, made)).expand(shape)
    decide = library()[f"blocks_{index}"]
    rng = random.Random(index)
    for _ in range(150):
        b, h = rng.randrange(BATCH), rng.randrange(HEADS)
        (i0, i1), (j0, j1) = (sorted(rng.choices(range(size), k=2)) for size in shape[2:])
        if rng.random() < 0.4:
            i1, j1 = min(i0 + 3, i1), min(j0 + 3, j1)
        found = decide(ctypes.byref(params), b, h, i0, i1, j0, j1)
        inside = seen[b, h, i0 : i1 + 1, j0 : j1 + 1]
        where = f"{program.allow} in {i0}..{i1} x {j0}..{j1}"
        assert found & 1 or not inside.any(), f"{where} is skipped, and some see a key"
        assert not found & 2 or inside.all(), f"{where} has no mask, and some do not see a key"
        assert not found & 4 or (inside == inside[:, :1]).all(), f"{where}: some query sees some of the keys, not all"
        assert not found & 8 or (inside == inside[:1]).all(), f"{where}: some queries see other keys"
    del kept


@needs_compiler
@pytest.mark.parametrize(
    ("name", "numbers", "queries", "keys", "found"),
    [
        ("documents", [0] * 10 + [1] * 10 + [2] * 3, (20, 22), (0, 19), 0),
        ("documents", [0] * 10 + [1] * 10 + [2] * 3, (13, 15), (11, 12), 3),
        (DOCUMENTS, [0] * 10 + [1] * 10 + [2] * 3, (8, 12), (3, 9), 5),
        (DOCUMENTS, [0] * 10 + [1] * 10 + [2] * 3, (8, 12), (3, 10), 1),
        ("images", [0] * 5 + [1] * 5 + [0] * 5 + [2] * 8, (0, 9), (10, 19), 0),
        ("images", [0] * 5 + [1] * 5 + [0] * 5 + [2] * 8, (15, 16), (18, 19), 3),
        ("tree", list(range(23)), (3, 5), (9, 12), 0),
    ],
)
def test_tiles_of_tensors_are_passed_by(name, numbers, queries, keys, found):
    """What tensors hide of whole tiles, and show: text between images, which has the number 0 everywhere, does not
    keep the tiles ahead of the diagonal from being passed by."""
    allow = EXAMPLES[name].allow if name in EXAMPLES else name
    index = [made.allow for made, _ in CASES].index(parse(allow=allow).allow)
    program, made = CASES[index]
    padded = torch.tensor(numbers + [numbers[-1]] * 6)
    made = {given.name: padded[: made[given.name].shape[-1]].expand_as(made[given.name]) for given in program.inputs}
    params, kept = params_of(program, made)
    decide = library()[f"blocks_{index}"]
    assert decide(ctypes.byref(params), 0, 0, *queries, *keys) == found
    del kept


# Windows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allow", "window", "rest"),
    [
        ("j <= i + seqlen_k - seqlen_q", (-1, 0), ""),
        ("j <= i", (-1, 3), ""),
        ("i + 3 >= j and document[i] == document[j]", (-1, 6), "document[i] == document[j]"),
        ("i - j < width and not i < j", (3, 3), ""),
        ("abs(i + seqlen_k - seqlen_q - j) <= width", (7, 7), ""),
        ("0 <= i - j < 2 * width", (10, 3), ""),
        ("j <= i and j <= i - 1 and j < 9", (-1, 2), "j < 9"),
        ("j <= i - 4", (-1, -1), "j <= i - 4"),
        ("2 * j <= i", (-1, -1), "2 * j <= i"),
        ("j <= i or j < 3", (-1, -1), "j <= i or j < 3"),
        ("j <= i + h", (-1, -1), "j <= i + h"),
        ("i == j", (-1, -1), "i == j"),
        ("j < width", (-1, -1), "j < width"),
    ],
)
def test_windows_are_found_in_masks(allow, window, rest):
    """With 23 queries, 20 keys; what is left must hide the same keys with the window as all of it did."""
    program = parse(allow=allow, types={"width": "int"} if "width" in allow else {})
    found = split_window(program, {"width": 7}, (23, 20))
    assert (found.left, found.right, found.rest.allow) == (*window, rest)
    values = {"i": torch.arange(23)[:, None], "j": torch.arange(20), "seqlen_q": 23, "seqlen_k": 20, "width": 7, "h": 0}
    values["document"] = torch.arange(23).div(5, rounding_mode="floor")
    options = Options(window_left=found.left, window_right=found.right)
    first, end = key_range(options, 23, 20, values["i"])
    seen = (values["j"] >= first) & (values["j"] < end) & evaluate(found.rest, "allow", torch, values)
    assert torch.equal(seen, evaluate(program, "allow", torch, values).expand(23, 20))


def test_windows_of_sequences_of_any_lengths():
    assert split_window(parse(allow="j <= i + seqlen_k - seqlen_q and i < 9"), {}, None)[:2] == (-1, 0)
    assert split_window(parse(allow="j <= i"), {}, None)[:2] == (-1, -1)


@pytest.mark.parametrize(
    ("allow", "given", "reduced", "rest"),
    [
        ("j <= i", {}, {"causal": True}, ""),
        ("j <= i and j % 3 != number_0", {}, {"causal": True}, "j % 3 != number_0"),
        ("i - j < number_0 and j <= i + number_1", {}, {"window_left": 4, "window_right": 9}, ""),
        ("i - j < number_0 and j % 3 < number_1", {}, {"window_left": 4}, "j % 3 < number_0"),
        ("i - j < number_0", {"causal": True, "window_left": 3}, {"causal": True, "window_left": 3}, ""),
        ("i - j < number_0", {"window_left": 30, "window_right": 2}, {"window_left": 4, "window_right": 2}, ""),
    ],
)
def test_a_call_runs_the_plainest_kernel(allow, given, reduced, rest):
    """Where an expression says what a mask of its own does, over 20 queries and keys: that kernel, and its numbers."""
    numbers = tuple(float(value) for name, value in (("number_0", 5), ("number_1", 9)) if name in allow)
    said = Options(
        expression=Expression(
            "", allow, ", ".join(f"{name}: int" for name in ("number_0", "number_1") if name in allow), numbers
        ),
        **given,
    )
    found = said.reduced(20, 20)
    assert found._replace(expression=None) == Options(**reduced)
    assert (found.expression.allow if found.expression else "") == rest
    assert not found.expression or len(found.expression.numbers) == rest.count("number")


def test_a_window_leaves_the_score_and_its_inputs():
    program = parse("s + bias[i - j]", "i - j < width and j < least", {"width": "int", "least": "int"})
    rest = split_window(program, {"width": 7, "least": 3}, (20, 20)).rest
    assert rest == parse("s + bias[i - j]", "j < least", {"least": "int"})


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("s - slope[h] * abs(i - j)", True),
        ("s + slope[h] * (j - i)", True),
        ("s - slope[b, h] * abs(i + seqlen_k - seqlen_q - j) + row[i]", True),
        ("s - abs(i - j) / 8 + i / 4", False),
        ("s - abs(i + j) / 8", False),
        ("s - abs(2 * i - j) / 8", False),
        ("s - abs(i - 2 * j) / 8", False),
        ("s - slope[h] * abs(-i - j)", False),
        ("s - abs(8 - i - j) / 8", False),
        ("s - abs(i - j) / 8 - abs(2 * i + seqlen_k - j)", False),
        ("cap * tanh(s / cap)", False),
    ],
)
def test_scores_whose_positions_count_by_distance_alone(score, expected):
    """Kernels then count from a tile's first key: any other score would be wrong."""
    assert score_code(parse(score), "fwd").of_distance is expected


@pytest.mark.parametrize(
    ("score", "element", "has_row"),
    [
        ("s - slope[h] * abs(i + seqlen_k - seqlen_q - j)", "head_2 * float_j", True),
        ("s - slope[h] * abs(i + seqlen_k - seqlen_q - j + 8)", "head_2 * float_j", True),
        ("s + slope[h] * (j - i)", "head_2 * float_j", True),
        ("s - slope[h] * abs(i - j)", "fabsf", False),  # of fewer queries than keys some lie before the key
        ("s - slope[h] * abs(i + seqlen_k - seqlen_q - j - 1)", "fabsf", False),
        ("s - slope[h] * sqrt(abs(i + seqlen_k - seqlen_q - j))", "sqrt_approx", False),
        ("s + row[i]", "row", False),
    ],
)
def test_what_keys_share_is_left_to_the_softmax(score, element, has_row):
    """Of keys that a causal mask shows: an element then needs one multiply-add."""
    code = score_code(parse(score), "fwd", causal=True, by_rows=True)
    assert element in " ".join(code.forward) and bool(code.of_row) is has_row
    assert "fabsf" in " ".join(score_code(parse(score), "fwd", by_rows=True).forward) or "abs" not in score


@pytest.mark.parametrize(
    ("score", "rise"),
    [
        ("s - slope[h] * abs(i + seqlen_k - seqlen_q - j)", "-load_input_0(p, h) * reciprocal_approx(p.softmax_scale)"),
        ("s + 2 * i - h - 2 * j", "2.0f * reciprocal_approx(p.softmax_scale)"),
        ("s - slope[h] * (j - i) + row[i]", None),
        ("s - slope[h] * abs(i - j)", None),
        ("s + i - 2 * j", None),
        ("s - slope[h] * (i - j) ** 2", None),
        ("2 * s - slope[h] * (i - j)", "-0.5f * load_input_0(p, h) * reciprocal_approx(p.softmax_scale)"),
        ("tanh(s) - (i - j)", None),
        ("s / 4 + h", None),
        ("2 * s", None),
    ],
)
def test_what_scores_rise_by_with_each_query(score, rise):
    """Where that is all that positions do, products start at it: else gradients would be another score's."""
    made = score_code(parse(score), "bwd", causal=True).rise
    assert made == (() if rise is None else (f"return {rise};",))


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("cap * tanh(s / cap)", 1.0),
        ("-cap[h] * tanh(s / cap[h])", 1.0),
        ("min(max(s, -3.0), 5.0)", 5.0),
        ("where(j > i, tanh(s), sigmoid(s) - 3)", 3.0),
        ("tanh(s) / 4 - 2 * abs(tanh(s)) + exp(min(s, 0.0))", math.inf),  # nobody knows how great exp is
        ("tanh(s) + slope[h] * (j - i)", math.inf),
        ("cap * tanh(s / cap) + shift", math.inf),
        ("min(s, 5.0)", math.inf),
        ("1e30 * tanh(s) * (1 + 1e30 * tanh(s / 2))", math.inf),  # in fp32
    ],
)
def test_how_far_from_0_scores_are(score, expected):
    assert parse(score).bound == expected


@pytest.mark.parametrize("allow", ["-1 * -x[i] < y[j]", "-1 * -2.0 * x[i] < y[j]"])
def test_signs_are_no_decrement(allow):
    made = emit(parse("", allow, {"x": "float", "y": "float"}), "allow")
    assert not any("--" in line for lines in made.levels.values() for line in lines)


def test_a_score_without_a_slope_has_gradients_of_its_tensors():
    (gradient,) = parse("where(s > 0, 1.0, 0.0) + bias[h]").gradients(["input_0"])
    assert gradient.factor.number == 1.0 and not gradient.of_s


def test_numbers_lie_in_their_range():
    """Of random scores, of many s: kernels look for no maximum where both ends are known."""
    rng, known = random.Random(2), 0
    for _ in range(60):
        text = f"{rng.uniform(-3, 3)} * tanh({random_score(rng)}) + min(max({random_score(rng)}, -2.0), abs(tanh(s)))"
        program = parse(text, types={name: type for name, type in TYPES.items() if name in text})
        low, high = range_of(lowered(simplify(program.score_tree)))
        found = evaluate(program, "score", torch, values_of(program, RANDOM) | {"s": 5 * scores()})
        assert ((found >= low - 1e-5) & (found <= high + 1e-5)).all(), text
        known += math.isfinite(low) and math.isfinite(high)
    assert known > 50


def test_a_divisor_of_heads_or_lengths_is_at_least_1():
    program = parse("s + i % ((h + 1) % 4)", "i // (seqlen_q // 2) == j")
    assert parse(program.score, program.allow) == program
    values = {name: torch.arange(6) for name in "ijh"} | {"s": torch.zeros(6), "seqlen_q": torch.tensor(1)}
    assert evaluate(program, "score", torch, values).tolist() == [0, 1, 2, 0, 0, 1]
    assert evaluate(program, "allow", torch, values).all()
