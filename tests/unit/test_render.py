"""Rendering: the same bytes everywhere, each line traced to its template, and no slip of a template let through."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

from fa2gen import render as render_module
from fa2gen._paths import data_dir
from fa2gen.errors import RenderError
from fa2gen.plan import KernelPlan, make_plan
from fa2gen.render import render
from fa2gen.select import default_tiling
from fa2gen.source import CONTENTS
from fa2gen.spec import KernelSpec, Problem

TEMPLATES = Path(data_dir("templates"))
NAME = "fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8"


def plan_of(problem: Problem, arch: str) -> KernelPlan:
    return make_plan(KernelSpec(problem=problem, tiling=default_tiling(problem, arch)))


PLANS = [
    plan_of(Problem(head_dim=head_dim, dtype=dtype, mask=mask), arch)
    for arch in ("sm80", "sm90")
    for head_dim, dtype, mask in [
        (8, "bf16", "full"),
        (64, "fp16", "full"),
        (72, "bf16", "causal"),
        (128, "bf16", "causal"),
        (256, "fp16", "causal"),
    ]
]
IDS = [plan.name for plan in PLANS]


@pytest.fixture
def plan() -> KernelPlan:
    return make_plan(KernelSpec.from_name(NAME))


def digest(plans: list[KernelPlan]) -> str:
    return hashlib.sha256("".join(render(plan).source for plan in plans).encode()).hexdigest()


def test_rendering_twice_gives_the_same_bytes():
    assert digest(PLANS) == digest(PLANS[::-1][::-1])
    render_module._environment.cache_clear()
    assert digest(PLANS) == digest(PLANS)


def test_another_process_renders_the_same_bytes(tmp_path):
    """The text is the cache's key: another hash seed, folder, time zone or locale must not change it."""
    code = (
        "import hashlib\n"
        "from fa2gen.plan import make_plan\nfrom fa2gen.render import render\nfrom fa2gen.spec import KernelSpec\n"
        f"names = {IDS!r}\n"
        "text = ''.join(render(make_plan(KernelSpec.from_name(n))).source for n in names)\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    for seed, zone in (("1", "Asia/Tokyo"), ("2", "UTC")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TZ": zone, "LC_ALL": "C"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == digest(PLANS)


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_the_text_knows_no_machine(plan):
    source = render(plan).source
    assert str(TEMPLATES) not in source and str(Path.home()) + "/" not in source
    assert not re.search(r"\b20[2-9]\d-\d\d-\d\d\b", source)


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_the_banner_says_what_the_kernel_is(plan):
    first = render(plan).source.splitlines()[:8]
    assert first[0] == f"// {plan.name}"
    head = "\n".join(first)
    for fact in (
        plan.template,
        f"head dim {plan.head_dim},",
        plan.dtype,
        f"{plan.mask} mask",
        f"{plan.num_threads} threads",
    ):
        assert fact in head
    assert f"{plan.shared_memory_bytes} bytes of dynamic shared memory" in head


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_the_contents_lead_to_the_sections(plan, target):
    lines = render(plan, target).lines
    first = next(i for i, line in enumerate(lines) if line.startswith(CONTENTS))
    last = next(i for i in range(first, len(lines)) if not lines[i].endswith(","))
    items = re.findall(r"(\d+) ([^,]+)", " ".join(line.removeprefix("//") for line in lines[first : last + 1]))
    headings = {number for number, line in enumerate(lines, start=1) if re.match("// .* ---+$", line)}
    assert {int(number) for number, _ in items} == headings and len(items) > 8
    for number, title in items:
        assert lines[int(number) - 1].startswith(f"// {title.strip()}")
    assert all(len(line) <= 120 for line in lines[first : last + 1])


# The source map ------------------------------------------------------------------------------------------------------

_TAG = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}")


def template_lines(name: str) -> list[str]:
    """A template's lines, with comments of several lines blanked."""
    text = (TEMPLATES / name).read_text()
    return re.sub(r"\{#.*?#\}", lambda match: "\n" * match[0].count("\n"), text, flags=re.S).splitlines()


def literals(template_line: str) -> list[str]:
    """The text of a template line that stands in every render of it, in order."""
    return [piece.strip() for piece in _TAG.split(template_line) if piece.strip()]


@pytest.mark.parametrize("target", ["cuda", "cpu"])
@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_each_line_comes_from_where_the_map_says(plan, target):
    """A compiler error must lead to the line to be edited, not near it."""
    rendered = render(plan, target)
    lines = rendered.source.split("\n")
    assert lines.pop() == "" and len(rendered.origins) == len(lines)
    texts = {
        name: template_lines(name)
        for name in (path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*.j2"))
    }
    blank = 0
    for line, origin in zip(lines, rendered.origins, strict=True):
        assert origin, f"no origin for {line!r}"
        name, _, number = origin.rpartition(":")
        template_line = texts[name][int(number) - 1]
        rest = line
        for piece in literals(template_line) if template_line != CONTENTS else ["//"]:
            assert piece in rest, f"{origin} holds {piece!r}, but made {line!r}"
            rest = rest.partition(piece)[2]
        blank += not literals(template_line)
        assert bool(line) or not literals(template_line)
    assert blank < 0.3 * len(lines), "a map of blank lines says nothing"


def test_lines_of_one_template_are_in_order(plan):
    """The spine reads top to bottom: its lines appear in the order in which they are written."""
    spine = [int(origin.rpartition(":")[2]) for origin in render(plan).origins if origin.startswith("sm90/fwd.cu.j2:")]
    assert spine == sorted(spine) and len(spine) > 150


@pytest.mark.parametrize("plan", PLANS, ids=IDS)
def test_no_mark_is_left(plan):
    for target in ("cuda", "cpu"):
        source = render(plan, target).source
        assert "\x02" not in source and "\x03" not in source


# What templates may print --------------------------------------------------------------------------------------------


def text_of(template: str, **values: object) -> str:
    return re.sub("\x02[^\x03]*\x03", "", render_module._environment("cuda").from_string(template).render(**values))


@pytest.mark.parametrize(
    "expression",
    [
        "128 / 16",
        "1.0",
        "none",
        "(0, 0)",
        "[1, 2]",
        "{'a': 1}",
        "ptx",
        "range",
        "ptx.register_lines(4)",
        "k",
        "1.5 | int / 2",
    ],
)
def test_only_text_integers_and_booleans_are_printed(expression, plan):
    """`constexpr int kTileM = 8.0;` compiles, and `(Undefined, Undefined)` was seen in other generators."""
    with pytest.raises(TypeError, match="only str, int and bool"):
        text_of("{{ " + expression + " }}", k=plan)


def test_booleans_are_spelt_as_in_c():
    assert (
        text_of("{{ true }} {{ 1 == 2 }} {{ 7 // 2 }} {{ 'x' ~ 1 }} {{ hex32(64) }}") == "true false 3 x1 0x00000040u"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ missing }}",
        "{{ k.tile_k }}",
        "{% if missing %}{% endif %}",
        "{% if k.casual %}{% endif %}",
        "{% for i in missing %}{% endfor %}",
        "{{ missing.more }}",
        "{{ ptx.no_such_function(1) }}",
        "{{ missing == 1 }}",
        "{{ 'a' ~ missing }}",
    ],
)
def test_a_misspelt_name_is_an_error(template, plan):
    with pytest.raises(jinja2.UndefinedError):
        text_of(template, k=plan)


def test_an_inline_if_without_else_is_an_error(plan):
    """Jinja gives a lenient Undefined there, even in strict mode."""
    with pytest.raises((TypeError, jinja2.UndefinedError)):
        text_of("{{ 'x' if k.tile_m == 1 }}", k=plan)


def test_cuda_is_not_escaped(plan):
    assert text_of("a < b && c > d \"x\" 'y' {{ '<&>' }}") == "a < b && c > d \"x\" 'y' <&>"


def test_templates_see_nothing_else():
    environment = render_module._environment("cuda")
    assert set(environment.globals) == {"ptx", "recipe", "hex32", "range"}
    assert environment.undefined is jinja2.StrictUndefined and not environment.autoescape
    assert environment.trim_blocks and environment.lstrip_blocks and environment.keep_trailing_newline


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """A copy of templates/ that a test may damage; gives its root."""
    root = tmp_path / "templates"
    shutil.copytree(TEMPLATES, root)
    monkeypatch.setattr(render_module, "data_dir", lambda name: root)
    render_module._environment.cache_clear()
    yield root
    render_module._environment.cache_clear()


def damage(root: Path, name: str, old: str, new: str) -> int:
    """Replaces text in a template; the number of its line."""
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new, 1))
    return text[: text.index(old)].count("\n") + 1


def test_an_edited_template_is_rendered(edited, plan):
    damage(edited, "sm90/fwd.cu.j2", "constexpr int kTileM = ", "constexpr int kTileM = 2 * ")
    assert "constexpr int kTileM = 2 * 128;" in render(plan).source


@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("sm90/fwd.cu.j2", "{{ k.tile_m }}", "{{ k.tile_k }}", "tile_k"),
        ("common/params.cuh.j2", "{{ param.name }}", "{{ param.nome }}", "nome"),
        ("ptx/wgmma.cuh.j2", "{{ op.function }}", "{{ op.n / 8 }}", "only str, int and bool"),
        ("sm90/fwd/gemm.cuh.j2", "{{ k.wgmma_qk.function }}", "{{ ptx.constraints(1) }}", "argument"),
    ],
)
def test_an_error_names_the_kernel_the_template_and_the_line(edited, plan, name, old, new, words):
    line = damage(edited, name, old, new)
    with pytest.raises(RenderError) as caught:
        render(plan)
    message = str(caught.value)
    assert plan.name in message and words in message and f"{name}:{line}: " in message


def test_a_syntax_error_names_the_template_and_the_line(edited, plan):
    line = damage(edited, "sm90/fwd/gemm.cuh.j2", "#pragma unroll", "{% iff %}")
    with pytest.raises(RenderError, match=rf"sm90/fwd/gemm\.cuh\.j2:{line}: .*iff"):
        render(plan)


def test_ptx_braces_are_a_loud_error(edited, plan):
    """`{%0, %1}` opens a Jinja tag: every slip of this kind must stop the render."""
    damage(edited, "ptx/tma.cuh.j2", "{ %3, %4", "{%3, %4")
    with pytest.raises(RenderError, match=r"ptx/tma\.cuh\.j2:"):
        render(plan)


def test_a_template_that_is_not_there_is_named(plan):
    with pytest.raises(RenderError, match=r"no template sm90/nothing\.cu\.j2"):
        render(dataclasses.replace(plan, template="sm90/nothing.cu.j2"))


def test_the_host_target_says_what_it_lacks(edited, plan):
    (edited / "cpu" / "wgmma.cuh.j2").unlink()
    with pytest.raises(RenderError, match=r"cpu/wgmma\.cuh\.j2, which the cpu target needs"):
        render(plan, "cpu")
