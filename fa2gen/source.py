"""A rendered source as text: which definitions its kernels reach, and where its sections begin.

Blocks of templates/ come in whole families; `prune` leaves of them what a kernel uses, so that a reader may trust that
all of a render matters. It reads the shape that templates write: definitions at top level, each with its comment right
above it, in sections that begin with `// Title ----`. Anything else at top level is an error, not a guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from fa2gen.errors import RenderError

__all__ = ["CONTENTS", "Rendered", "prune", "with_contents"]

CONTENTS = "//   contents"
"""The line of a banner behind which `with_contents` writes."""

_CONTENTS_COLUMNS = 120

_HEADING = re.compile(r"// (.*?) -{3,}$")
_STRING_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\])*"|//.*')
_WORD = re.compile(r"[A-Za-z_]\w*")
_ATTRIBUTE = re.compile(r"\b(?:__launch_bounds__|__align__|alignas)\([^()]*\)")
_NAMES = (
    re.compile(r"(?:struct|enum)\s+(\w+)"),
    re.compile(r"using\s+(?:\w+::)*(\w+)"),
    re.compile(r"extern\s+__shared__[^;]*?(\w+)\["),
    re.compile(r"constexpr\s[^=({;]*?(\w+)\s*="),
    re.compile(r"[\w\s*&:]*?(\w+)\s*\("),  # a function
)
_ENUMERATORS = re.compile(r"(\w+)\s*(?:=[^,}]*)?[,}]")


@dataclass(frozen=True)
class Rendered:
    """A kernel's source and where each of its lines came from.

    origins[i] is "sm90/fwd.cu.j2:23" for rendered line i + 1, or "" for a line that no literal template text made.
    """

    source: str
    origins: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        return self.source.splitlines()


@dataclass(frozen=True)
class _Part:
    """Some lines at top level, [first, last): a definition, a comment, a section's heading or what holds them all.

    kind   "definition", "comment", "heading", "frame" (preprocessor lines, braces of a namespace) or "blank".
    names  what a definition defines; words what it, or a frame, mentions.
    root   whether it is a kernel.
    """

    kind: str
    first: int
    last: int
    names: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    root: bool = False


def prune(rendered: Rendered) -> Rendered:
    """The source without the definitions that no kernel reaches, their comments, and sections that they leave empty.

    A definition is reached by its name: all functions of one name stay if one does. A source without a kernel stays as
    it is. Raises RenderError for a line at top level that is no definition of a known shape.
    """
    parts = _parts(rendered.lines)
    alive = _reached(parts)
    return _kept(rendered, [part for index, part in enumerate(parts) if _stays(parts, index, alive, rendered.origins)])


def with_contents(rendered: Rendered) -> Rendered:
    """The source with its sections and their line numbers behind the banner's CONTENTS line, if it has one."""
    lines, origins = rendered.lines, list(rendered.origins)
    if CONTENTS not in lines:
        return rendered
    at = lines.index(CONTENTS)
    titles = [(number, match[1]) for number, line in enumerate(lines) if (match := _HEADING.match(line))]
    # Numbers have four columns whatever they are, so that how many lines this takes does not depend on them.
    texts = [re.split(r"[:.,] | \(", title)[0] for _, title in titles]
    rows: list[list[int]] = []
    width = _CONTENTS_COLUMNS + 1
    for index, text in enumerate(texts):
        item = len(f"1234 {text}, ")
        if width + item > _CONTENTS_COLUMNS:
            rows.append([])
            width = len(CONTENTS) + 1
        rows[-1].append(index)
        width += item
    added = max(len(rows) - 1, 0)
    shown = [", ".join(f"{titles[i][0] + 1 + added:4} {texts[i]}" for i in row) for row in rows]
    margin = "//".ljust(len(CONTENTS))
    lines[at : at + 1] = [f"{margin if i else CONTENTS} {text}{',' * (i < added)}" for i, text in enumerate(shown)]
    origins[at : at + 1] = [origins[at]] * len(shown)
    return Rendered("\n".join(lines) + "\n", tuple(origins))


def _parts(lines: list[str]) -> list[_Part]:
    parts: list[_Part] = []
    at = 0
    while at < len(lines):
        part = _part_at(lines, at)
        parts.append(part)
        at = part.last
    return parts


def _part_at(lines: list[str], first: int) -> _Part:
    line = lines[first]
    if not line:
        return _Part("blank", first, first + 1)
    if line.startswith("//"):
        comment = list(takewhile(lambda text: text.startswith("//"), lines[first:]))
        return _Part("heading" if _HEADING.match(line) else "comment", first, first + len(comment))
    if line.startswith(("#", "namespace ", "}")):
        return _Part("frame", first, first + 1, words=frozenset(_WORD.findall(_bare(line))))
    code, depth = [], 0
    for number in range(first, len(lines)):
        code.append(_bare(lines[number]))
        depth += _depth(code[-1])
        if depth == 0 and code[-1].endswith((";", "}")):
            text = "\n".join(code)
            root = "__global__" in text
            return _Part("definition", first, number + 1, _names_of(text, first), frozenset(_WORD.findall(text)), root)
    raise RenderError(f"line {first + 1} begins a definition that does not end: {line}")


def _depth(code: str) -> int:
    """Brackets that a line opens, less those that it closes."""
    opened = code.count("(") + code.count("{") + code.count("[")
    return opened - code.count(")") - code.count("}") - code.count("]")


def _bare(line: str) -> str:
    """A line without its comment, with empty strings."""
    if '"' not in line and "//" not in line:
        return line  # most: three times as fast
    return _STRING_OR_COMMENT.sub(lambda found: '""' if found[0].startswith('"') else "", line).rstrip()


def _names_of(code: str, first: int) -> frozenset[str]:
    """`{"kTileM"}` of "constexpr int kTileM = 128;"; of an enum its enumerators too."""
    bare = _ATTRIBUTE.sub("", code).removeprefix('extern ""').lstrip()
    for pattern in _NAMES:
        if match := pattern.match(bare):
            body = bare.partition("{")[2] if bare.startswith("enum") else ""
            return frozenset((match[1], *_ENUMERATORS.findall(body)))
    raise RenderError(f"line {first + 1} is no definition that fa2gen knows: {code.splitlines()[0]}")


def _reached(parts: list[_Part]) -> set[int]:
    """The indices of definitions that kernels reach; of all where there is no kernel."""
    definitions = {index: part for index, part in enumerate(parts) if part.kind == "definition"}
    by_name: dict[str, list[int]] = {}
    for index, part in definitions.items():
        for name in part.names:
            by_name.setdefault(name, []).append(index)
    alive = {index for index, part in definitions.items() if part.root} or set(definitions)
    waiting = [*alive, *(index for index, part in enumerate(parts) if part.kind == "frame")]
    while waiting:
        for word in parts[waiting.pop()].words & by_name.keys():
            found = set(by_name[word]) - alive
            alive |= found
            waiting += found
    return alive


def _stays(parts: list[_Part], index: int, alive: set[int], origins: tuple[str, ...]) -> bool:
    part = parts[index]
    if part.kind == "definition":
        return index in alive
    if part.kind == "heading":
        # A section is its own file's; what follows of another file without a heading is not what it announces.
        about = [i for i in _section(parts, index) if parts[i].kind == "definition"]
        file = origins[part.first].rpartition(":")[0]
        return not about or any(i in alive and origins[parts[i].first].rpartition(":")[0] == file for i in about)
    if part.kind == "comment" and index > 0:  # the first is the banner
        about = list(_followers(parts, index))
        return not about or any(i in alive or parts[i].kind == "frame" for i in about)
    return True


def _section(parts: list[_Part], index: int) -> Iterator[int]:
    """What follows a heading, up to the next."""
    return takewhile(lambda i: parts[i].kind != "heading", range(index + 1, len(parts)))


def _followers(parts: list[_Part], index: int) -> Iterator[int]:
    """What a comment is about: the definitions right below it; where a blank line follows, all to the next comment that
    stands alone."""
    alone = index + 1 < len(parts) and parts[index + 1].kind == "blank"
    for i in range(index + 1, len(parts)):
        kind = parts[i].kind
        if kind == "heading" or (kind in ("blank", "comment") and not alone):
            return
        if kind == "comment" and parts[i + 1].kind == "blank":
            return
        if kind in ("definition", "frame"):
            yield i


def _kept(rendered: Rendered, parts: list[_Part]) -> Rendered:
    """These parts' lines, with no blank line twice in a row, first or last."""
    lines = rendered.lines
    numbers: list[int] = []
    for part in parts:
        for number in range(part.first, part.last):
            if lines[number] or (numbers and lines[numbers[-1]]):
                numbers.append(number)
    while numbers and not lines[numbers[-1]]:
        numbers.pop()
    return Rendered("\n".join(lines[i] for i in numbers) + "\n", tuple(rendered.origins[i] for i in numbers))
