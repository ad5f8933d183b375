"""The rules that templates and what they render obey, over every template and every default and catalogue kernel."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import get_args

import jinja2
import pytest
from jinja2 import meta, nodes

from fa2gen._paths import data_dir
from fa2gen.catalog import catalogue
from fa2gen.plan import KernelPlan, feasible_tilings, fits, make_plan
from fa2gen.render import LAUNCHER, Rendered, render, render_launcher
from fa2gen.select import default_tiling
from fa2gen.spec import DType, KernelSpec, Mask, Problem, Tiling
from fa2gen.testing import problems as problems_of

TEMPLATES = Path(data_dir("templates"))
NAMES = sorted(path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*.j2"))
ENVIRONMENT = jinja2.Environment()
MAX_COLUMNS = 128


def text_of(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


@functools.cache
def tree(name: str) -> nodes.Template:
    return ENVIRONMENT.parse(text_of(name))


@functools.cache
def plans() -> list[KernelPlan]:
    """The catalogue, every default, and one tiling of each kind that has a branch of its own in some template."""
    shape = {"arch", "tile_m", "tile_n", "num_stages", "num_mma_warps", "swizzle_bytes"}
    switches = {field: get_args(info.annotation) for field, info in Tiling.model_fields.items() if field not in shape}
    problems = [  # every head dim; masks and dtypes take turns
        Problem(head_dim=d, dtype=dtype, mask=mask)
        for d, dtype, mask in zip(
            range(8, 257, 8), itertools.cycle(get_args(DType)), itertools.cycle(get_args(Mask)), strict=False
        )
    ]
    specs = [*catalogue()]
    backward = [problem.model_copy(update={"direction": "bwd"}) for problem in problems]
    ordered = [problem.model_copy(update={"deterministic": True}) for problem in backward if problem.head_dim % 40 == 0]
    modified = [
        Problem(direction=direction, head_dim=d, mask=m, score="cap * tanh(s / cap) + sqrt(abs(s) + 1)")
        for direction in ("fwd", "bwd")
        for d in (64, 128)
        for m in get_args(Mask)
    ]
    modified += [
        Problem(head_dim=64, mask="window", score=s) for s in ("cap * tanh(s / cap)", "min(max(s, -4.0), 6.0)")
    ]
    modified += [  # split by products, which none but expressions need at such head dims
        Problem(direction="bwd", head_dim=192, mask="causal", deterministic=True, score="cap * tanh(s / cap)"),
        Problem(direction="bwd", head_dim=192, mask="window", score="cap * tanh(s / cap)", allow="(i - j) % 3 < width"),
    ]
    modified += [
        Problem(direction=direction, head_dim=d, score="s + slope[b, h] * (j - i)")
        for direction, d in (("fwd", 64), ("bwd", 64), ("bwd", 128))  # of these the last starts products at terms
    ]
    modified += [
        Problem(direction=direction, head_dim=64, score="where(kind[j] == 2, s, s + bias[h, i, j])")
        for direction in ("fwd", "bwd")
    ]
    modified += [  # gradients of tensors, by all ways in which elements find their numbers
        Problem(direction="bwd", head_dim=d, score=score, learned=learned, varlen=varlen)
        for d in (64, 128, 192)
        for score, learned, varlen in (
            ("s + bias[h, i, j] - slope[h] * j + 2 * far[h, i - j] + near[i - j]", "bias, slope, far, near", False),
            ("s * row[b, i] + column[j]", "row, column", True),
        )
    ]
    modified += [
        Problem(direction=direction, head_dim=64, sink=True, varlen=varlen)
        for direction in ("fwd", "bwd")
        for varlen in (False, True)
    ]
    modified += [  # at 256 by warps in pairs
        Problem(head_dim=d, mask=m, varlen=m == "window", partial=True)
        for d, m in ((64, "full"), (64, "window"), (256, "full"))
    ]
    modified += [  # blocks of one document, looked up by a warp of its own, or over pages
        Problem(head_dim=128, allow="document[b, i] == document[b, j]", varlen=paged, paged=paged)
        for paged in (False, True)
    ]
    modified += [Problem(direction="bwd", head_dim=256, varlen=True)]  # P passes, and places are read again
    modified += [
        Problem(head_dim=d, varlen=True, paged=True, allow=a) for d in (64, 128) for a in ("", "j % 3 != i % 2")
    ]
    modified += [
        Problem(direction=direction, head_dim=d, dropout=True, score=score)
        for direction in ("fwd", "bwd")
        for d, score in ((64, ""), (192, ""), (128, "cap * tanh(s / cap)"), (192, "cap * tanh(s / cap)"))
    ]
    modified += [
        Problem(
            direction=direction, head_dim=d, mask=m, score=score, allow="(i - j) // 3 % 5 < (j - i) // width % width"
        )
        for direction in ("fwd", "bwd")
        for d in (64, 128)
        for m in get_args(Mask)
        for score in ("", "cap * tanh(s / cap)")
    ]
    modified += [  # tiles are passed by for tensors
        Problem(direction=direction, head_dim=64, varlen=varlen, allow="kind[i, b] == kind[j, b] and kind[i, b] > 0")
        for direction in ("fwd", "bwd")
        for varlen in (False, True)
    ]
    specs += [
        KernelSpec(problem=p, tiling=default_tiling(p, arch))
        for p in backward + ordered + modified
        for arch in ("sm80", "sm90")
    ]
    specs += [
        KernelSpec(problem=problem, tiling=tiling)
        for problem in (Problem(direction="bwd", head_dim=64), Problem(direction="bwd", head_dim=72, mask="causal"))
        for arch in ("sm80", "sm90")
        for kind in (("tile_m", "tile_n", "num_mma_warps"), ("num_stages", "num_mma_warps", "swizzle_bytes"))
        for tiling in {tuple(getattr(t, of) for of in kind): t for t in feasible_tilings(problem, arch)}.values()
    ]
    for arch in ("sm80", "sm90"):
        specs += [KernelSpec(problem=problem, tiling=default_tiling(problem, arch)) for problem in problems]
        for problem in (Problem(head_dim=128), Problem(head_dim=72, mask="causal")):
            tilings = feasible_tilings(problem, arch)
            kinds = {(t.num_stages, t.num_mma_warps, t.swizzle_bytes): t for t in tilings}
            specs += [KernelSpec(problem=problem, tiling=tiling) for tiling in kinds.values()]
            tiling = default_tiling(problem, arch)
            varied = [
                tiling.model_copy(update={field: value}) for field, values in switches.items() for value in values
            ]
            specs += [spec for spec in (KernelSpec(problem=problem, tiling=t) for t in varied) if fits(spec)]
    by_rows = [p for p in modified if p.paged and not p.allow] + [
        Problem(head_dim=192, head_dim_v=128, varlen=True, paged=True)
    ]
    by_rows += [Problem(head_dim=d, mask=mask, varlen=True, paged=True) for d, mask in ((64, "causal"), (96, "window"))]
    for problem, heads in itertools.product(by_rows, (0, 1)):
        tiling = default_tiling(problem, "sm90").model_copy(update={"page_rows": 1, "pack_heads": heads})
        specs.append(KernelSpec(problem=problem, tiling=tiling))
    one_q = Problem(head_dim=128, mask="causal", varlen=True, paged=True)  # a warp of V loads Q of one stage
    tiling = default_tiling(one_q, "sm90").model_copy(update={"tile_n": 64, "num_stages": 3})
    specs.append(KernelSpec(problem=one_q, tiling=tiling))
    for mask, more in (("full", {"pack_heads": 1}), ("causal", {"page_rows": 1}), ("window", {})):
        problem = Problem(head_dim=64, head_dim_v=72, mask=mask, sink=not more, varlen=True, paged=True)
        tiling = default_tiling(problem, "sm90").model_copy(update={"split_keys": 1, **more})
        specs.append(KernelSpec(problem=problem, tiling=tiling))
    dropped = Problem(head_dim=64, dropout=True)
    for arch in ("sm80", "sm90"):  # blocks of 32 keys more than whole units of random bits
        tiling = default_tiling(dropped, arch).model_copy(update={"tile_n": 96})
        specs.append(KernelSpec(problem=dropped, tiling=tiling))
    dropped = Problem(direction="bwd", head_dim=64, mask="causal", dropout=True)
    specs.append(KernelSpec(problem=dropped, tiling=default_tiling(dropped, "sm90")))
    by_distance = Problem(head_dim=64, mask="causal", score="s - slope[h] * abs(i + seqlen_k - seqlen_q - j)")
    tiling = default_tiling(by_distance, "sm90").model_copy(update={"lazy_rescale": 0})
    specs.append(KernelSpec(problem=by_distance, tiling=tiling))
    of_v = [
        Problem(head_dim=d, head_dim_v=v, direction=way, varlen=d == 72)
        for d, v in ((192, 128), (72, 8), (64, 256))
        for way in ("fwd", "bwd")
    ]
    specs += [KernelSpec(problem=p, tiling=default_tiling(p, arch)) for p in of_v for arch in ("sm80", "sm90")]
    kinds_of_batch = ((False, False), (True, False), (False, True))
    in_parts = [*((d, *kind) for d in (64, 72, 256) for kind in kinds_of_batch), (168, False, False)]
    for (d, varlen, partial), arch in itertools.product(in_parts, ("sm80", "sm90")):
        problem = Problem(direction="bwd", head_dim=d, head_dim_v=d - 8, varlen=varlen, partial=partial)
        tiling = default_tiling(problem, arch).model_copy(update={"group_parts": 2, "heads_abreast": int(varlen)})
        specs.append(KernelSpec(problem=problem, tiling=tiling))
    for d, mask in ((72, "full"), (128, "causal"), (256, "full")):
        problem = Problem(direction="bwd", head_dim=d, mask=mask)
        tiling = default_tiling(problem, "sm90").model_copy(update={"tail_parts": 3})
        specs.append(KernelSpec(problem=problem, tiling=tiling))
    unrounded = Problem(direction="bwd", head_dim=72, partial=True)
    for arch in ("sm80", "sm90"):  # however warpgroups split the work
        of_keys = {t.tile_n: t for t in feasible_tilings(unrounded, arch)}
        specs += [KernelSpec(problem=unrounded, tiling=tiling) for tiling in of_keys.values()]
    for d, mask, score in ((32, "full", ""), (64, "window", ""), (96, "causal", ""), (96, "causal", "3 * tanh(s / 3)")):
        problem = Problem(direction="bwd", head_dim=d, mask=mask, score=score)
        tiling = default_tiling(problem, "sm90").model_copy(update={"keys_in_turn": 1})
        specs.append(KernelSpec(problem=problem, tiling=tiling))
    cached = problems_of(direction="decode", head_dim=[8, 72, 128, 256], sink=False, cache_dtype="same")
    cached += [
        Problem(direction="decode", head_dim=64, mask=mask, sink=True, paged=True, score=score, allow=allow)
        for mask, score, allow in (
            ("window", "", ""),
            ("full", "cap * tanh(s / cap)", ""),
            ("causal", "s + slope[b, h] * (j - i)", "(i - j) % 3 < width"),
        )
    ]
    specs += [KernelSpec(problem=p, tiling=default_tiling(p, arch)) for p in cached for arch in ("sm80", "sm90")]
    cap = "cap * tanh(s / cap)"
    for arch, cache, dtype, d, score in (
        ("sm80", "int8", "fp16", 64, cap), ("sm90", "e4m3", "bf16", 128, ""), ("sm90", "e4m3", "fp16", 256, cap),
        ("sm80", "int8", "bf16", 80, ""),
    ):  # fmt: skip
        p = Problem(direction="decode", cache_dtype=cache, dtype=dtype, head_dim=d, score=score)
        specs.append(KernelSpec(problem=p, tiling=default_tiling(p, arch)))
    problem = Problem(direction="bwd", head_dim=128)
    kinds = {(t.tile_m, t.tile_n, t.num_stages, t.num_mma_warps): t for t in feasible_tilings(problem, "sm90")}
    specs += [KernelSpec(problem=problem, tiling=tiling) for tiling in kinds.values()]
    return [make_plan(spec) for spec in dict.fromkeys(specs)]


@functools.cache
def renders() -> dict[str, Rendered]:
    return {plan.name: render(plan) for plan in plans()}


@functools.cache
def each_line() -> dict[tuple[str, str], str]:
    """(line, origin) of all renders, each once -> one of the kernels that have it."""
    return {
        found: name
        for name, rendered in renders().items()
        for found in zip(rendered.source.splitlines(), rendered.origins, strict=True)
    }


def report(offenders: dict[str, str]) -> str:
    return "\n".join(f"{origin}: {what}" for origin, what in sorted(offenders.items()))


# Templates as they are written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_templates_use_the_plan_and_nothing_else(name):
    """A variable of any other name is a misspelling that only a branch not yet taken hides."""
    assert meta.find_undeclared_variables(tree(name)) <= {"k", "ptx", "recipe", "hex32", "range"}


@pytest.mark.parametrize("name", NAMES)
def test_no_template_hides_an_undefined_name(name):
    filters = {node.name for node in tree(name).find_all(nodes.Filter)}
    tests = {node.name for node in tree(name).find_all(nodes.Test)}
    assert not filters & {"default", "d"} and not tests & {"defined", "undefined"}


@pytest.mark.parametrize("name", NAMES)
def test_inline_ifs_have_an_else(name):
    lines = [node.lineno for node in tree(name).find_all(nodes.CondExpr) if node.expr2 is None]
    assert not lines, f'{name}:{lines}: write `else ""`'


@pytest.mark.parametrize("name", NAMES)
def test_templates_do_no_arithmetic(name):
    """Numbers come from the plan, where tests count them again. Loop indices excepted, there is nothing to compute."""
    kinds = (nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Pow)
    found = [node for kind in kinds for node in tree(name).find_all(kind)]
    # One less than a field is the plural of "stage" in a comment, and the count of a wait that is named after it.
    allowed = [node for node in found if isinstance(node, nodes.Sub) and isinstance(node.right, nodes.Const)]
    assert len(found) == len(allowed), f"{name}: arithmetic in lines {[node.lineno for node in found]}"


@pytest.mark.parametrize("name", NAMES)
def test_only_plain_tags(name):
    """No macro, no `set`, no inheritance, no whitespace control: what a reader sees is what is rendered."""
    text = text_of(name)
    assert "{%-" not in text and "-%}" not in text and "{{-" not in text and "-}}" not in text
    forbidden = (
        nodes.Macro,
        nodes.Assign,
        nodes.AssignBlock,
        nodes.Extends,
        nodes.Block,
        nodes.FilterBlock,
        nodes.CallBlock,
        nodes.With,
    )
    assert not [node for kind in forbidden for node in tree(name).find_all(kind)]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("ptx/", "cpu/"))])
def test_assembly_lives_in_ptx(name):
    """So the CPU can supply the same names, and a reader of a kernel needs no PTX manual."""
    code = re.sub(r"\{#.*?#\}|//[^\n]*", "", text_of(name), flags=re.S)
    assert not re.search(r"\basm\b|__asm|__nv_|__shfl|__cvta|__sync", code)


@pytest.mark.parametrize("name", NAMES)
def test_template_files_are_tidy(name):
    text = text_of(name)
    assert (
        text.endswith("\n") and not text.endswith("\n\n") and "\t" not in text and "\r" not in text and text.isascii()
    )
    assert not [number for number, line in enumerate(text.splitlines(), start=1) if line != line.rstrip()]


@pytest.mark.parametrize("name", NAMES)
def test_every_template_is_included_somewhere(name):
    """Dead templates are read, edited and never tested."""
    if name.endswith(".cu.j2") or name == LAUNCHER:
        return
    base = f"ptx/{name.removeprefix('cpu/')}" if name.startswith("cpu/") else name
    users = "\n".join(text_of(other) for other in NAMES)
    stems = re.sub(r"[a-z]+\.cuh\.j2$", "", base), re.sub(r"[^/]+$", "", base)  # sm80/fwd/pipeline_ ~, rooms/mask/ ~
    assert f'"{base}"' in users or any(f'"{stem}" ~ ' in users for stem in stems)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ptx/")])
def test_the_cpu_offers_every_primitive(name):
    assert name.replace("ptx/", "cpu/") in NAMES, "the cpu target renders the same spines"


# What they render ----------------------------------------------------------------------------------------------------


def test_rendered_cuda_is_specialised():
    """If the spec decides it, Jinja; what is left is C++ without templates, conditions on features, or headers."""
    offenders = {
        origin: line
        for line, origin in each_line()
        if re.search(r"\btemplate\s*<|if constexpr|^\s*#(?!pragma unroll(?: \d+)?$)|\btypename\b|std::", line)
    }
    assert not offenders, report(offenders)


def test_no_line_is_too_long():
    offenders = {
        origin: f"{len(line)} columns in {name}"
        for (line, origin), name in each_line().items()
        if len(line) > MAX_COLUMNS
    }
    assert not offenders, report(offenders)


def test_whitespace_is_tidy():
    for name, rendered in renders().items():
        source = rendered.source
        assert source.endswith(f"\n\n}}  // namespace fa2gen::{name}\n") and not source.startswith("\n"), name
        assert "\n\n\n" not in source and "\t" not in source and source.isascii(), name
        assert not re.search(r"[ ]\n", source), name
        inside = re.sub(r"^namespace .*|^\}  // namespace .*", "", source, flags=re.M)
        assert not re.search(r"\{\n\n|\n\n[ ]*\}", inside), f"{name}: a blank line inside a brace"


def test_no_jinja_is_left():
    offenders = {origin: line for line, origin in each_line() if re.search(r"\{\{|\}\}|\{%|%\}|\{#|#\}", line)}
    # `{%0, %1}` is PTX's vector operand, inside a string.
    offenders = {origin: line for origin, line in offenders.items() if not re.search(r'"[^"]*\{%\d+', line)}
    assert not offenders, report(offenders)


def test_assembly_comes_from_ptx_only():
    offenders = {origin: line for line, origin in each_line() if re.search(r"\basm\b", line.partition("//")[0])}
    assert offenders and all(origin.startswith("ptx/") for origin in offenders), report(offenders)


def test_braces_balance():
    for name, rendered in renders().items():
        code = re.sub(r'"(?:\\.|[^"\\])*"|//[^\n]*', "", rendered.source)
        assert all(code.count(a) == code.count(b) for a, b in ("{}", "()", "[]")), name


_DEFINED = re.compile(
    r"^constexpr [\w ]+ (k[A-Z]\w*) =|^struct(?: alignas\(\d+\))? (\w+)|^using (?:std::)?(\w+)"
    r"|^ *(?:__device__ )?(?:__forceinline__|inline) [\w ]+? (\w+)\(|^ +(k[A-Z]\w*) = [^,()]+,"
    r"|^extern __shared__ .* (\w+)\[\]"
)
_KERNEL = re.compile(r'^extern "C" __global__')


def unreached(source: str) -> list[str]:
    """What a source defines, at top level and in structs, and no kernel reaches: by names, definition by definition."""
    pieces: list[tuple[str, list[str]]] = [("", [])]
    for line in source.splitlines():
        if match := _DEFINED.match(line):
            pieces.append(
                (next(filter(None, match.groups())), [line.replace(next(filter(None, match.groups())), "", 1)])
            )
        elif _KERNEL.match(line):
            pieces.append(("", [line]))
        else:
            pieces[-1][1].append(line)
    words: dict[str, set[str]] = {}
    for name, lines in pieces:
        code = re.sub(r'"(?:\\.|[^"\\])*"|//[^\n]*', "", "\n".join(lines))
        words.setdefault(name, set()).update(re.findall(r"\w+", code))
    reached, waiting = {""}, [""]
    while waiting:
        found = (words[waiting.pop()] & words.keys()) - reached
        reached |= found
        waiting += found
    return sorted(words.keys() - reached)


def test_nothing_is_unused():
    """A reader may trust that all of a kernel matters: whatever it defines, one of its kernels uses."""
    offenders, seen = {}, 0
    for spec in catalogue():
        source = renders()[spec.name].source
        seen += sum(bool(_DEFINED.match(line)) for line in source.splitlines())
        offenders |= dict.fromkeys(unreached(source), spec.name)
    assert seen > 60 * len(catalogue()) and not offenders, report(offenders)


def test_nothing_is_unused_on_the_cpu():
    offenders = {name: plan.name for plan in plans()[::20] for name in unreached(render(plan, "cpu").source)}
    assert not offenders, report(offenders)


def test_unused_names_are_found():
    source = "constexpr int kUsed = 1;\n\n__device__ __forceinline__ int lost() {\n    return kUsed + kept();\n}\n"
    kernel = 'extern "C" __global__ void kernel() {\n    kept();\n}\n'
    assert unreached(source + "inline int kept() {\n    return 2;\n}\n" + kernel) == ["kUsed", "lost"]


def test_every_field_of_params_is_read():
    offenders = {}
    for plan in plans():
        read = set(re.findall(r"\bp\.(\w+)", renders()[plan.name].source))
        offenders |= {f"{plan.template}: {x.name}": plan.name for x in plan.params if x.name not in read}
    assert not offenders, report(offenders)


def test_the_symbol_is_the_name():
    for plan in plans():
        name, rendered = plan.name, renders()[plan.name]
        symbols = re.findall(r'^extern "C" __global__ void __launch_bounds__\([^)]*\)\s+(\w+)\(', rendered.source, re.M)
        assert symbols == [entry.symbol for entry in plan.entry_points]
        assert name in symbols


# Coverage ------------------------------------------------------------------------------------------------------------


def literal_lines(name: str) -> set[str]:
    """`name:line` of every line of a template with text of its own outside tags and comments."""
    found = set()
    for number, kind, value in ENVIRONMENT.lex(text_of(name)):
        if kind == "data":
            found |= {f"{name}:{number + i}" for i, line in enumerate(value.split("\n")) if line.strip()}
    return found


def test_every_line_of_every_template_is_rendered_by_some_kernel():
    """A line that no test renders is a line that no test compiles: a misspelt field could lie in it."""
    covered = {origin for _, origin in each_line()}
    some = [*plans()[::10], *[plan for plan in plans() if plan.varlen and plan.arch == "sm90"][:2]]
    some += [plan for plan in plans() if plan.tile_tables][:1]
    covered |= {origin for plan in some if plan.has_launcher for origin in render_launcher(plan).origins}
    wanted = {line for name in NAMES if not name.startswith("cpu/") for line in literal_lines(name)}
    holes = wanted - covered
    assert not holes, "no kernel shows\n" + "\n".join(sorted(holes))


def test_every_line_of_the_cpu_primitives_is_rendered_too():
    holes = {line for name in NAMES if name.startswith("cpu/") for line in literal_lines(name)}
    alike = {"head_dim": 64, "head_dim_v": 64, "dtype": "bf16"}
    kinds = {(plan.arch, plan.problem.model_copy(update=alike)): plan for plan in plans()}
    for plan in (
        *plans()[::40],
        *kinds.values(),
        *reversed(plans()),
    ):  # a few show all, one of each problem before others
        holes -= set(render(plan, "cpu").origins)
        if not holes:
            break
    assert not holes, "no kernel shows\n" + "\n".join(sorted(holes))
