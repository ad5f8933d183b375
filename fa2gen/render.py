"""From a plan to CUDA text: the one Jinja environment of fa2gen, and the map from rendered lines to template lines.

`render(plan)` is a pure function of the plan: no date, version or machine reaches the text, and no definition that its
kernels do not use. With `target="cpu"` the same spine is rendered over templates/cpu/, which offers the names of
templates/ptx/ to a C++ compiler.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.ext import Extension
from jinja2.lexer import Token, TokenStream

from fa2gen import ptx
from fa2gen._paths import data_dir
from fa2gen.errors import RenderError
from fa2gen.plan import KernelPlan, recipe
from fa2gen.source import Rendered, prune, with_contents

__all__ = ["Rendered", "Target", "finish", "render", "render_launcher"]

Target = Literal["cuda", "cpu"]

LAUNCHER = "common/launcher.cc.j2"

_MARK = "\x02{name}:{line}\x03"
_MARK_PATTERN = re.compile("\x02([^\x03]*)\x03")


class _MarkOrigins(Extension):
    """Writes `\\x02template:line\\x03` before each line of literal template text; `_strip_marks` takes it out again."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        # The file, not the name: for the CPU, the name ptx/... stands for a file of cpu/.
        name = _relative(stream.filename) if stream.filename else stream.name
        for token in stream:
            if token.type == "data":
                marked = "\n".join(
                    _MARK.format(name=name, line=token.lineno + i) + line
                    for i, line in enumerate(token.value.split("\n"))
                )
                yield Token(token.lineno, "data", marked)
            else:
                yield token


def _relative(path: str) -> str:
    """`sm90/fwd.cu.j2` of a template's path."""
    return Path(path).relative_to(data_dir("templates")).as_posix()


def finish(text: str, name: str) -> Rendered:
    """What a template of the environment gave, without marks and without what no kernel in it uses.

    Raises RenderError, which says that it is about `name`.
    """
    try:
        return with_contents(prune(_strip_marks(text)))
    except RenderError as error:
        raise RenderError(f"{name}: {error}") from error


def _strip_marks(text: str) -> Rendered:
    lines: list[str] = []
    origins: list[str] = []
    for marked in text.split("\n"):
        marks = _MARK_PATTERN.findall(marked)
        line = _MARK_PATTERN.sub("", marked).rstrip()
        if not line and (not lines or not lines[-1]):
            continue  # no leading and no double blank lines, whatever the template's tags left behind
        lines.append(line)
        origins.append(marks[-1] if marks else "")
    while lines and not lines[-1]:
        lines.pop()
        origins.pop()
    return Rendered("\n".join(lines) + "\n", tuple(origins))


def _finalize(value: Any) -> str | int:
    """Only text, integers and booleans may reach the source: a float or a tuple is a mistake in a plan or template."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return value
    if isinstance(value, jinja2.StrictUndefined):
        str(value)  # raises, and names what is undefined
    raise TypeError(f"a template printed {value!r} ({type(value).__name__}); only str, int and bool are allowed")


def _hex32(value: int) -> str:
    """`0x40000040u`."""
    return f"0x{value:08x}u"


@functools.cache
def _environment(target: Target) -> jinja2.Environment:
    root = Path(data_dir("templates"))

    def load(name: str) -> tuple[str, str, Callable[[], bool]]:
        path = root / (f"cpu/{name.removeprefix('ptx/')}" if target == "cpu" and name.startswith("ptx/") else name)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise jinja2.TemplateNotFound(path.relative_to(root).as_posix()) from None
        return text, str(path), lambda: True

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        extensions=[_MarkOrigins],
        undefined=jinja2.StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals = {"ptx": ptx, "recipe": recipe, "hex32": _hex32, "range": range}
    return environment


def render(plan: KernelPlan, target: Target = "cuda") -> Rendered:
    """The source of one kernel. Raises RenderError with the template's name and line."""
    return finish(_text(plan, plan.template, target), plan.name)


def render_launcher(plan: KernelPlan) -> Rendered:
    """A launcher for one kernel's cubin: C++17 over the driver API, to be compiled alone or behind the kernel.

    Raises RenderError for decoding kernels, and for dropout.
    """
    if not plan.has_launcher:
        what = "dropout" if plan.dropout else "queries over a cache"
        raise RenderError(
            f"{plan.name}: there is no launcher of {what}\n"
            "  nearest        without it: the comment at the end of the render says how it is launched"
        )
    return _strip_marks(_text(plan, LAUNCHER, "cuda"))


def _text(plan: KernelPlan, template: str, target: Target) -> str:
    """What a template makes of a plan, with marks. Raises RenderError."""
    try:
        return _environment(target).get_template(template).render(k=plan)
    except jinja2.TemplateSyntaxError as error:
        where = _relative(error.filename) if error.filename else error.name
        raise RenderError(f"{plan.name}: {where}:{error.lineno}: {error.message}") from error
    except jinja2.TemplateNotFound as error:
        raise RenderError(f"{plan.name}: no template {error.name}, which the {target} target needs") from error
    except (jinja2.UndefinedError, TypeError, AttributeError) as error:
        raise RenderError(f"{plan.name}: {_template_line(error)}{error}") from error


def _template_line(error: BaseException) -> str:
    """The innermost template frame of a rendering error, `sm90/fwd.cu.j2:23: `."""
    root, found, trace = Path(data_dir("templates")), "", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if path.is_relative_to(root):
            found = f"{path.relative_to(root).as_posix()}:{trace.tb_lineno}: "
        trace = trace.tb_next
    return found
