"""What pruning takes out of a render and what it leaves, and the contents that are written into its banner."""

from __future__ import annotations

import textwrap

import pytest

from fa2gen.errors import RenderError
from fa2gen.source import CONTENTS, Rendered, prune, with_contents

KERNEL = """
// Kernel ---

extern "C" __global__ void __launch_bounds__(kNumThreads, 1) kernel(const __grid_constant__ Params p) {
    work(p);
}
"""


def rendered(text: str, file: str = "a") -> Rendered:
    source = textwrap.dedent(text).lstrip("\n")
    return Rendered(source, tuple(f"{file}:{n}" for n, _ in enumerate(source.splitlines(), start=1)))


def pruned(text: str) -> str:
    return prune(rendered(textwrap.dedent(text) + KERNEL)).source


def test_what_a_kernel_reaches_stays_and_the_rest_goes():
    text = """
    // A banner.

    constexpr int kNumThreads = 128;
    constexpr int kLost = 1;  // it ends here
    constexpr int kFound = 2;

    struct Params {
        int n;
    };

    // Calls leaf.
    __device__ __forceinline__ void work(Params const& p) {
        leaf("lost();", p, kFound);  // lost()
    }

    // Calls itself and work, but nobody calls it.
    __device__ __forceinline__ void lost() {
        lost();
        work({kLost});
    }
    """
    leaf = "\n__device__ __forceinline__ void leaf(\n    char const* text, Params const& p) {\n    {}\n}\n"
    kept = pruned(textwrap.dedent(text) + leaf)
    assert "lost() {" not in kept and "kLost" not in kept and "nobody" not in kept
    for piece in ("// A banner.", "kNumThreads = 128", "kFound = 2", "struct Params", "// Calls leaf.", "void leaf("):
        assert piece in kept
    assert "\n\n\n" not in kept and kept.endswith("}\n")


def test_origins_stay_with_their_lines():
    whole = rendered("constexpr int kLost = 1;\n\nvoid work() {\n}\n" + KERNEL.replace("kNumThreads", "128"))
    of = dict(zip(whole.origins, whole.lines, strict=True))
    left = prune(whole)
    assert left.lines[0] == "void work() {" and len(left.lines) == len(left.origins) < len(whole.lines)
    assert all(of[origin] == line for line, origin in zip(left.lines, left.origins, strict=True))


@pytest.mark.parametrize(
    ("definition", "use"),
    [
        ("struct alignas(64) Used {\n    int n;\n};", "Used x"),
        ("enum Barrier : int {\n    kUsed = 1,\n    kOther = 2,\n};", "kUsed"),
        ("using used_t = long long;", "used_t x"),
        ("using std::used_t;", "used_t x"),
        ("extern __shared__ __align__(1024) unsigned char used[];", "used"),
        ("constexpr uint32_t kUsed = f(3);", "kUsed"),
        ("constexpr int used(int x) {\n    return x;\n}", "used(1)"),
        ("__device__ __forceinline__ int const* used(int (&x)[4]) {\n    return x;\n}", "used(y)"),
        ("inline int used(int x) {\n    return x;\n}", "used(1)"),
    ],
)
def test_every_kind_of_definition(definition, use):
    assert definition in pruned(f"{definition}\n\nvoid work() {{\n    {use};\n}}\n")
    assert definition not in pruned(f"{definition}\n\nvoid work() {{\n}}\n")


def test_all_functions_of_one_name_stay():
    kept = pruned("void f(int) {}\n\nvoid f(float) {}\n\nvoid work() {\n    f(1);\n}\n")
    assert "f(int)" in kept and "f(float)" in kept


def test_a_comment_goes_with_what_stands_below_it():
    text = "// Banner.\n\n// Of a.\nconstexpr int kA = 1;\n// Of b, c.\nconstexpr int kB = 2;\nconstexpr int {} = 3;\n"
    kept = pruned(text.format("kC"))
    assert "Of a" not in kept and "Of b" not in kept
    kept = pruned(text.format("kNumThreads"))
    assert "Of a" not in kept and "// Of b, c.\nconstexpr int kNumThreads" in kept


def test_an_empty_section_goes():
    """Its heading, and text below that; also where another file's definitions follow without a heading of their own."""
    empty = rendered("// Empty ---\n// Text.\n\nvoid lost() {}\n\n", "a")
    other = rendered("void work() {}\n" + KERNEL, "b")
    left = prune(Rendered(empty.source + other.source, empty.origins + other.origins)).source
    assert left == "void work() {}\n" + KERNEL


def test_a_section_of_text_stays():
    text = "void work() {}\n" + KERNEL + "\n// Launch ---\n// As you like.\n"
    assert prune(rendered(text)).source == text


def test_the_frame_of_a_namespace_stays():
    kept = pruned("#include <cuda.h>\nnamespace one {\n\nvoid work() {}\n") + "\n}  // namespace one\n"
    assert prune(rendered(kept)).source == kept and kept.startswith("#include <cuda.h>\nnamespace one {\n\nvoid work")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("int;\n", "line 1 is no definition that fa2gen knows: int;"),
        ("void f() {\n", "line 1 begins a definition that"),
    ],
)
def test_what_is_not_understood_is_an_error(text, words):
    with pytest.raises(RenderError, match=words):
        prune(rendered(text))


def test_contents():
    titles = [f"Section {i}: about it" for i in range(30)] + ["cp.async", "Softmax (Algorithm 1)"]
    text = f"// kernel\n{CONTENTS}\n// more\n\n" + "\n\n".join(
        f"// {title} ---\n\nint f{i}();" for i, title in enumerate(titles)
    )
    found = with_contents(rendered(text + "\n"))
    lines = found.lines
    assert len(found.origins) == len(lines) and all(len(line) <= 120 for line in lines)
    at = {line.split(" ", 1)[1].split(" ---")[0]: n for n, line in enumerate(lines, start=1) if line.endswith(" ---")}
    shown = "\n".join(lines[: lines.index("// more")])
    for title in titles:
        short = title.split(":")[0].split(" (")[0]
        assert f"{at[title]:4} {short}" in shown


def test_a_source_without_that_line_gets_no_contents():
    text = rendered("// kernel\n\n// One ---\n")
    assert with_contents(text) == text
