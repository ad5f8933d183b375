"""The committed renders in generated/golden/, byte for byte.

    python -m tests.unit.test_golden --write      in a checkout: renders them anew

They change only with a template, and the diff is then the review of that change: what it does to real kernels.
"""

from __future__ import annotations

import difflib
import itertools
import sys
from pathlib import Path

import pytest

from fa2gen._paths import data_dir
from fa2gen.plan import make_plan
from fa2gen.render import LAUNCHER, render
from fa2gen.spec import KernelSpec, Problem

FOLDER = Path(__file__).resolve().parents[2] / "generated" / "golden"
REFRESH = "python -m tests.unit.test_golden --write"

# Together they show every template: both masks and dtypes, one stage and several, O beside Q and in its place, and the
# ways to split the backward pass over warpgroups.
SINKS = Problem(head_dim=128, allow="j <= i and (i - j < window or j < sinks)").words[-1]
IMAGES = Problem(head_dim=128, allow="j <= i or image[b, i] == image[b, j] and image[b, i] > 0").words[-1]
CAP = Problem(head_dim=128, score="cap * tanh(s / cap)").words[-1]
ALIBI = Problem(
    direction="bwd", head_dim=128, mask="causal", score="s - slope[h] * abs(i + seqlen_k - seqlen_q - j)"
).words[-1]
BIAS = Problem(direction="bwd", head_dim=128, score="s + bias[b, h, i, j]", learned="bias").words[-1]
NAMES = (
    "fa2_bwd_sm80_bf16_d128_causal_m64_n128_s2_w8",
    "fa2_bwd_sm80_bf16_d64_m32_n128_s2_w4",
    "fa2_bwd_sm80_bf16_d64_causal_sink_drop_m128_n128_s2_w8",
    "fa2_bwd_sm80_fp16_d256_det_m64_n64_s1_w8",
    "fa2_bwd_sm90_bf16_d64_causal_drop_m128_n128_s2_w8_l1",
    "fa2_bwd_sm90_bf16_d64_m128_n128_s2_w8_l1_t1",
    "fa2_bwd_sm90_bf16_d96_causal_m64_n128_s2_w8_l1_t1",
    "fa2_bwd_sm90_bf16_d128_causal_m64_n128_s2_w8_l1",
    f"fa2_bwd_sm90_bf16_d128_causal_{CAP}_m64_n128_s2_w8",
    f"fa2_bwd_sm90_bf16_d128_causal_{ALIBI}_m64_n128_s2_w8_l1",
    f"fa2_bwd_sm90_bf16_d128_{SINKS}_m64_n128_s2_w8",
    f"fa2_bwd_sm90_bf16_d128_{BIAS}_m48_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_det_m80_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_causal_varlen_m64_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d128_window_det_m64_n128_s2_w8_l1",
    "fa2_bwd_sm90_bf16_d128_causal_partial_m64_n128_s2_w8_l1",
    "fa2_bwd_sm90_bf16_d192_v128_causal_m48_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d256_m64_n64_s2_w8",
    "fa2_bwd_sm90_bf16_d256_m64_n80_s2_w8_e2",
    "fa2_bwd_sm90_fp16_d64_m128_n128_s2_w8",
    "fa2_bwd_sm90_bf16_d64_causal_m128_n128_s2_w8_l1_g4",
    f"fa2_decode_sm80_bf16_d128_causal_sink_{CAP}_m16_n32_s2_w4",
    "fa2_decode_sm90_bf16_d128_e4m3_paged_m16_n32_s3_w8",
    "fa2_decode_sm90_bf16_d256_window_paged_m16_n16_s3_w4",
    "fa2_fwd_sm80_bf16_d128_causal_m128_n64_s1_w4",
    "fa2_fwd_sm80_bf16_d256_causal_m64_n64_s1_w4_r1",
    "fa2_fwd_sm80_bf16_d64_window_sink_drop_m128_n64_s2_w4",
    "fa2_fwd_sm80_fp16_d64_m128_n64_s2_w4",
    "fa2_fwd_sm80_fp16_d64_varlen_paged_m128_n64_s2_w4",
    "fa2_fwd_sm80_fp16_d64_window_m128_n64_s2_w4",
    "fa2_fwd_sm90_bf16_d128_causal_m192_n80_s2_w12_r1",
    "fa2_fwd_sm90_bf16_d128_causal_m128_n128_s2_w8",
    "fa2_fwd_sm90_bf16_d128_causal_varlen_m192_n80_s2_w12_r1",
    "fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m192_n64_s3_w12_r1",
    "fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m192_n64_s3_w12_r1_p1_q1",
    "fa2_fwd_sm90_bf16_d128_causal_varlen_paged_m128_n128_s2_w8_r1_q1_k1",
    "fa2_fwd_sm90_bf16_d128_causal_partial_m192_n80_s2_w12_r1",
    f"fa2_fwd_sm90_bf16_d128_causal_{CAP}_m192_n80_s2_w12_r1",
    f"fa2_fwd_sm90_bf16_d128_{IMAGES}_m128_n112_s2_w8_r1",
    f"fa2_fwd_sm90_bf16_d128_{SINKS}_m192_n80_s2_w12_r1",
    "fa2_fwd_sm90_bf16_d128_window_m192_n80_s2_w12_r1",
    "fa2_fwd_sm90_bf16_d192_v128_causal_m192_n64_s2_w12_r1",
    "fa2_fwd_sm90_bf16_d248_m128_n80_s2_w8",
    "fa2_fwd_sm90_fp16_d64_m192_n128_s3_w12",
)


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.cu"


def rendered(name: str) -> str:
    return render(make_plan(KernelSpec.from_name(name))).source


def write() -> None:
    """Renders every golden anew and removes those that are no longer wanted."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in FOLDER.glob("*.cu"):
        if path.stem not in NAMES:
            path.unlink()
            print(f"removed {path.name}")
    for name in NAMES:
        old = path_of(name).read_bytes() if path_of(name).exists() else b""
        new = rendered(name).encode()
        path_of(name).write_bytes(new)
        print(f"{'as it was' if new == old else 'written'}  {path_of(name).name}")


@pytest.mark.parametrize("name", NAMES)
def test_the_render_is_the_golden(name):
    if not path_of(name).exists():
        pytest.fail(f"generated/golden/{name}.cu is missing: {REFRESH}")
    golden, now = path_of(name).read_bytes().decode(), rendered(name)
    if now != golden:
        diff = difflib.unified_diff(golden.splitlines(), now.splitlines(), "golden", "now", lineterm="", n=1)
        shown = "\n".join(itertools.islice(diff, 40))
        pytest.fail(
            f"{name} renders differently. If that is meant: {REFRESH}, and review the diff\n{shown}", pytrace=False
        )


def test_there_are_no_others():
    """A golden that no test compares is a page that no longer says what fa2gen does."""
    assert sorted(path.name for path in FOLDER.iterdir()) == [f"{name}.cu" for name in sorted(NAMES)], REFRESH


def test_together_they_show_every_template():
    """A change to any template is then seen in the diff of a golden."""
    shown = {
        origin.rpartition(":")[0] for name in NAMES for origin in render(make_plan(KernelSpec.from_name(name))).origins
    }
    root = Path(data_dir("templates"))
    names = {path.relative_to(root).as_posix() for path in root.rglob("*.j2")}
    assert shown == {name for name in names if not name.startswith("cpu/") and name != LAUNCHER}


def test_readme_quotes_a_golden():
    """The excerpt in README.md is text of the golden that it links to."""
    readme = (FOLDER.parents[1] / "README.md").read_text()
    start = readme.find("```cuda\n")
    if start < 0:
        pytest.skip("README.md shows no kernel")
    excerpt = readme[start:].split("\n", 1)[1].split("\n```")[0]
    linked = [name for name in NAMES if f"generated/golden/{name}.cu" in readme]
    assert linked, f"README.md links to a golden that is not one of {NAMES}"

    def joined(text: str) -> str:
        """Without indentation and line breaks, which README.md may set anew."""
        return " ".join(text.replace("//", " ").split())

    assert any(joined(excerpt) in joined(rendered(name)) for name in linked), "README.md's excerpt is out of date"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {REFRESH}")
    write()
