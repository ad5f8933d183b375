"""fa2gen as flash_attn: what imports that finds names, versions, signatures and numbers as it expects them."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import inspect
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fa2gen import UnsupportedProblem, attention, flash_attn_varlen_func, padding
from fa2gen.cli.app import app
from fa2gen.reference import check, check_gradients
from fa2gen.shim import SITE, VERSION, interface, rotary
from fa2gen.shim.wheel import write_wheel

ROOT = Path(__file__).resolve().parents[2]
INSTALL = "import fa2gen; fa2gen.install_as_flash_attn()\n"
# What is imported by whom: Megatron, TransformerEngine, diffusers, ring-flash-attention, unsloth, vLLM, transformers,
# and flash_attn's own tests.
IMPORTS = """
import importlib.metadata, importlib.util
from flash_attn import __version__, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn import flash_attn_qkvpacked_func, flash_attn_kvpacked_func
from flash_attn import flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func
from flash_attn.flash_attn_interface import _flash_attn_forward, _flash_attn_backward
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward, _flash_attn_varlen_backward
from flash_attn.flash_attn_interface import _wrapped_flash_attn_forward, _wrapped_flash_attn_backward
from flash_attn.flash_attn_interface import flash_attn_gpu, flash_attn_unpadded_func
from flash_attn.flash_attn_interface import _get_block_size_n, maybe_contiguous, USE_TRITON_ROCM
from flash_attn.bert_padding import index_first_axis, index_put_first_axis, pad_input, unpad_input
from flash_attn.bert_padding import index_first_axis_residual, unpad_input_for_concatenated_sequences
from flash_attn.layers.rotary import apply_rotary_emb, RotaryEmbedding, apply_rotary_emb_qkv_, apply_rotary_emb_kv_
from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn_2_cuda import varlen_bwd
import flash_attn
assert importlib.util.find_spec("flash_attn") is not None
assert importlib.util.find_spec("flash_attn.cute") is None
assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn") == __version__
assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
try:
    from flash_attn.losses.cross_entropy import CrossEntropyLoss
    raise SystemExit("a loss")
except ImportError:
    pass
print(__version__, flash_attn_func.__module__)
"""


def run(code: str, *path: Path, status: int = 0) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT), *sys.path])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


def test_what_others_import_is_there():
    """Also for transformers, whether it has looked for flash_attn before or not."""
    code = INSTALL + IMPORTS
    if importlib.util.find_spec("transformers"):
        looks = "assert utils.is_flash_attn_greater_or_equal('2.8.0')\n"
        before = "from transformers.utils import import_utils as utils\n"
        before += "assert not utils.is_flash_attn_greater_or_equal('2.0.0')\n"
        code = before + code + looks
    assert run(code).split() == [VERSION, "fa2gen.ops.flash"]


def test_a_wheel_is_the_same_for_every_process(tmp_path):
    done = CliRunner().invoke(app, ["shim", "wheel", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    path = Path(done.output.strip())
    assert path.name == f"flash_attn-{VERSION}-py3-none-any.whl"
    first = path.read_bytes()
    assert write_wheel(tmp_path).read_bytes() == first
    with zipfile.ZipFile(path) as wheel:
        wheel.extractall(tmp_path / "site")
        record = wheel.read(f"flash_attn-{VERSION}.dist-info/RECORD").decode().splitlines()
        names = {line.split(",")[0] for line in record}
        assert names == set(wheel.namelist())
        for line in record[:-1]:
            name, digest, size = line.split(",")
            content = wheel.read(name)
            expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            assert (digest, int(size)) == (f"sha256={expected}", len(content))
    assert run(IMPORTS, tmp_path / "site").split() == [VERSION, "fa2gen.ops.flash"]
    assert run(INSTALL + IMPORTS, tmp_path / "site").split()[0] == VERSION  # beside itself it is no other


def test_a_real_flash_attn_is_left_alone(tmp_path):
    package, info = tmp_path / "flash_attn", tmp_path / "flash_attn-2.8.3.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.8.3'\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    for before in ("", "import flash_attn\n"):
        assert "InvalidInput: flash_attn is there already" in run(before + INSTALL, tmp_path, status=1)
        forced = before + INSTALL.replace("()", "(force=True)")
        assert run(forced + "import flash_attn; print(flash_attn.__version__)", tmp_path).strip() == VERSION


def test_a_script_runs_in_its_folder_with_its_arguments(tmp_path):
    (tmp_path / "neighbour.py").write_text("name = 'neighbour'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import flash_attn, neighbour, sys\nprint(flash_attn.__version__, neighbour.name, sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "fa2gen.shim", str(script), "--steps", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == f"{VERSION} neighbour ['--steps', '3']"


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [(["--help"], 0, "usage: "), ([], 2, "usage: "), (["no_script.py", "-x"], 2, "no_script.py is not there\nusage: ")],
)
def test_a_script_that_is_not_there_is_told_the_usage(arguments, status, said):
    command = [sys.executable, "-m", "fa2gen.shim", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, (done.stdout + done.stderr).startswith(said)) == (status, True), done.stderr


def test_every_file_of_the_distribution_is_named_in_it():
    (info,) = SITE.glob("*.dist-info")
    assert f"\nVersion: {VERSION}\n" in (info / "METADATA").read_text()
    top = {path.name.removesuffix(".py") for path in SITE.iterdir() if path != info and path.name != "__pycache__"}
    assert set((info / "top_level.txt").read_text().split()) == top


# Private functions ------------------------------------------------------------------------------------------------


def tensors(*shape):
    torch.manual_seed(0)
    batch, seqlen_q, seqlen_k = shape
    sizes = ((seqlen_q, 4), (seqlen_k, 2), (seqlen_k, 2))
    return [torch.randn(batch, seqlen, heads, 16).bfloat16() for seqlen, heads in sizes]


def test_one_pass_each_as_diffusers_calls_them():
    q, k, v = tensors(2, 70, 70)
    out, lse, mask, state = interface._flash_attn_forward(q, k, v, 0.0, 0.3, True, 20, -1, 0.0, None, False)
    said = {"softmax_scale": 0.3, "causal": True, "window_left": 20}
    assert mask is None and state is not None
    assert check(out, lse, q, k, v, **said).ok
    dout = torch.randn_like(out)
    grads = [torch.full_like(x, float("nan")) for x in (q, k, v)]
    sums = interface._flash_attn_backward(
        dout, q, k, v, out, lse, *grads, 0.0, 0.3, True, 20, -1, 0.0, None, True, rng_state=state
    )
    assert check_gradients(tuple(grads), dout, q, k, v, **said).ok
    torch.testing.assert_close(sums, torch.einsum("bshd,bshd->bhs", dout.float(), out.float()))


def test_rings_merge_partial_results():
    """As ring-flash-attention does: each part's call by keywords, the whole row's out and lse in the backward pass."""
    q, k, v = tensors(1, 64, 64)
    names = inspect.signature(interface._flash_attn_forward).parameters
    usual = dict.fromkeys(names) | {"dropout_p": 0.0, "causal": False, "window_size_left": -1, "window_size_right": -1}
    usual |= {"softcap": 0.0, "return_softmax": False, "softmax_scale": 0.25}
    del usual["q"], usual["k"], usual["v"]
    halves = [(k[:, :32], v[:, :32]), (k[:, 32:], v[:, 32:])]
    parts = [interface._flash_attn_forward(q, *half, **usual)[:2] for half in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(o.float() * (part - lse).exp().transpose(1, 2).unsqueeze(-1) for o, part in parts).bfloat16()
    assert check(out, lse, q, k, v, softmax_scale=0.25).ok
    dout, found = torch.randn_like(out), []
    for half in halves:
        grads = [torch.empty_like(x) for x in (q, *half)]
        options = {name: x for name, x in usual.items() if name != "return_softmax"} | {"deterministic": False}
        interface._flash_attn_backward(dout, q, *half, out, lse, *grads, **options)
        found.append(grads)
    (dq0, *first), (dq1, *second) = found
    dk, dv = (torch.cat(x, dim=1) for x in zip(first, second, strict=True))
    assert check_gradients((dq0 + dq1, dk, dv), dout, q, k, v, softmax_scale=0.25).ok


@pytest.mark.parametrize("packed", [False, True])
def test_one_pass_each_as_transformer_engine_calls_them(packed):
    """Its context parallel: options by keywords, `causal` beside sides of a window that say the same."""
    bounds = torch.tensor([0, 30, 64], dtype=torch.int32)
    q, k, v = (x[0] if packed else x for x in tensors(1, 64, 64))
    lengths, more = ((bounds, bounds, 34, 34), {"block_table": None}) if packed else ((), {})
    said = {"softmax_scale": 0.25, "dropout_p": 0.0, "window_size_left": -1, "window_size_right": 0}
    said |= {"alibi_slopes": None, "softcap": 0.0, "causal": True}
    forward = interface._flash_attn_varlen_forward if packed else interface._flash_attn_forward
    out, lse, _, state = forward(q, k, v, *lengths, **said, **more, return_softmax=False)
    dout, grads = torch.randn_like(out), [torch.empty_like(x) for x in (q, k, v)]
    backward = interface._flash_attn_varlen_backward if packed else interface._flash_attn_backward
    backward(dout, q, k, v, out, lse, *grads, *lengths, **said, deterministic=False, rng_state=state)
    for a, b in [(0, 30), (30, 64)] if packed else [(0, 64)]:
        at = slice(a, b) if packed else (slice(None), slice(a, b))
        rows = [x[at][None] if packed else x[at] for x in (q, k, v, dout, *grads)]
        verdict = check_gradients(tuple(rows[4:]), rows[3], *rows[:3], causal=True, softmax_scale=0.25)
        assert verdict.ok, verdict


def test_packed_batches_in_one_pass_each():
    bounds = torch.tensor([0, 30, 71], dtype=torch.int32)
    q, k, v = (x[0].requires_grad_() for x in tensors(1, 71, 71))
    out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, bounds, bounds, 41, 41, 0.0, None, True)
    expected, expected_lse, _ = flash_attn_varlen_func(q, k, v, bounds, bounds, causal=True, return_attn_probs=True)
    torch.testing.assert_close((out, lse), (expected, expected_lse))
    dout = torch.randn_like(out)
    grads = [torch.empty_like(x) for x in (q, k, v)]
    lengths, options = (bounds, bounds, 41, 41), (0.0, None, True, -1, -1, 0.0, None, False)
    interface._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *lengths, *options)
    for x, right in zip(grads, torch.autograd.grad(expected, (q, k, v), dout), strict=True):
        torch.testing.assert_close(x, right)


def test_what_a_pass_does_not_have_is_refused():
    q, k, v = tensors(1, 8, 8)
    for options, name in (((0.1, 1.0, True, -1, -1, 0.0, None, False), "dropout_p"),):
        with pytest.raises(UnsupportedProblem, match=name):
            interface._flash_attn_forward(q, k, v, *options)
    out, lse = attention(q, k, v)
    for options, name in (
        ((0.0, 1.0, True, -1, -1, 30.0, None, False), "softcap"),
        ((0.0, 1.0, True, -1, -1, 0.0, torch.ones(4), False), "alibi_slopes"),
    ):
        with pytest.raises(UnsupportedProblem, match=name):
            interface._flash_attn_backward(q, q, k, v, out, lse, q, k, v, *options)


# Helpers ----------------------------------------------------------------------------------------------------------


def test_rows_that_hold_several_sequences_are_unpacked():
    x = torch.arange(12.0).reshape(2, 6, 1)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    packed, indices, bounds, longest = padding.unpad_input_for_concatenated_sequences(x, lengths)
    assert packed.flatten().tolist() == indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    assert bounds.tolist() == [0, 2, 5, 9] and longest == 4
    assert padding.index_put_first_axis(packed, indices, 12).flatten().tolist() == [0, 1, 2, 3, 4, 0, 6, 7, 8, 9, 0, 0]


def test_rows_and_the_residual_have_one_gradient():
    x, indices = torch.randn(4, 3, requires_grad=True), torch.tensor([2, 0])
    rows, residual = padding.index_first_axis_residual(x, indices)
    assert rows.equal(x[indices]) and residual.equal(x)
    (rows.sum() * 2 + residual.sum()).backward()
    assert x.grad[:, 0].tolist() == [3, 1, 3, 1]


def turned(x, places, interleaved, rotary_dim=8):
    """x (..., head_dim) at places (...) by complex numbers."""
    angles = places.double().unsqueeze(-1) * 10000.0 ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim)
    part = x[..., :rotary_dim].double()
    a, b = (part[..., ::2], part[..., 1::2]) if interleaved else part.chunk(2, dim=-1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)
    result = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((result, x[..., rotary_dim:].double()), -1)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary(interleaved):
    """By one offset, offsets of each sequence, packed sequences; in place, back again, with a gradient."""
    x = torch.randn(2, 5, 3, 12)
    at = torch.outer(torch.arange(20.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    cos, sin = at.cos(), at.sin()
    offsets, bounds = torch.tensor([3, 7]), torch.tensor([0, 4, 10], dtype=torch.int32)
    rows = torch.arange(5)
    cases = [
        (x, {}, rows.expand(2, 5)),
        (x, {"seqlen_offsets": 4}, rows.expand(2, 5) + 4),
        (x, {"seqlen_offsets": offsets}, rows + offsets[:, None]),
        (x.flatten(0, 1), {"cu_seqlens": bounds}, torch.cat((rows[:4], torch.arange(6)))),
        (
            x.flatten(0, 1),
            {"cu_seqlens": bounds, "seqlen_offsets": offsets},
            torch.cat((rows[:4] + 3, torch.arange(6) + 7)),
        ),
    ]
    for given, said, places in cases:
        expected = turned(given, places.unsqueeze(-1), interleaved).float()
        found = rotary.apply_rotary_emb(given, cos, sin, interleaved, **said)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        back = rotary.apply_rotary(found.clone(), cos, sin, interleaved=interleaved, conjugate=True, **said)
        torch.testing.assert_close(back, given, rtol=0, atol=1e-5)
        target = given.clone()
        assert rotary.apply_rotary_emb(target, cos, sin, interleaved, inplace=True, **said) is target
        torch.testing.assert_close(target, expected, rtol=0, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (rotary.apply_rotary_emb(leaf, cos, sin, interleaved) * x).sum().backward()
    torch.testing.assert_close(leaf.grad, rotary.apply_rotary(x, cos, sin, interleaved=interleaved, conjugate=True))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_embedding_turns_q_and_k_and_not_v(interleaved):
    embedding = rotary.RotaryEmbedding(8, interleaved=interleaved)
    qkv = torch.randn(2, 5, 3, 2, 12)
    places = (torch.arange(5) + 6).view(1, 5, 1)
    expected = [turned(qkv[:, :, i], places, interleaved).float() for i in range(2)] + [qkv[:, :, 2]]
    found = embedding(qkv.clone(), seqlen_offset=6)
    torch.testing.assert_close(found, torch.stack(expected, dim=2), rtol=0, atol=1e-5)
    q, kv = embedding(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone(), seqlen_offset=6)
    torch.testing.assert_close(q, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(kv, torch.stack(expected[1:], dim=2), rtol=0, atol=1e-5)
    grouped = embedding(torch.cat((qkv[:, :, 0], *qkv[:, :, 1:, :1].unbind(2)), dim=2), seqlen_offset=6, num_heads_q=2)
    torch.testing.assert_close(grouped[:, :, :2], expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(grouped[:, :, 2], expected[1][:, :, 0], rtol=0, atol=1e-5)
    assert grouped[:, :, 3].equal(qkv[:, :, 2, 0])


@pytest.mark.parametrize("shape", [(2, 5, 3, 2, 12), (2, 5, 2, 2, 12), (2, 5, 8, 12)], ids=["qkv", "kv", "grouped"])
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "view"])
def test_rotary_in_place_has_the_gradient(shape, leaf):
    """Of a leaf, and of a view such as those of unbind, which autograd lets nobody write to: flash_attn takes both."""
    embedding, x = rotary.RotaryEmbedding(8), torch.randn(shape)
    embedding._update_cos_sin_cache(5, dtype=x.dtype)
    cos, sin = embedding._cos_cached, embedding._sin_cached
    given = x.clone().requires_grad_()
    target = given if leaf else torch.stack((given, given)).mul(1).unbind(0)[0]
    if shape[2] == 2:
        out, turned = rotary.apply_rotary_emb_kv_(target, cos, sin), [(slice(None), slice(None), 0)]
    else:
        out = rotary.apply_rotary_emb_qkv_(target, cos, sin, num_heads_q=4 if len(shape) == 4 else None)
        parts = (slice(0, 4), slice(4, 6)) if len(shape) == 4 else (0, 1)
        turned = [(slice(None), slice(None), part) for part in parts]
    expected = x.clone()
    for part in turned:
        expected[part] = rotary.apply_rotary_emb(x[part], cos, sin)
    assert out.equal(expected) and target.equal(expected)
    weights = torch.randn(shape)
    (gradient,) = torch.autograd.grad((out * weights).sum(), given)
    for part in turned:
        weights[part] = rotary.apply_rotary_emb(weights[part], cos, -sin)
    torch.testing.assert_close(gradient, weights)


class Scaled(rotary.RotaryEmbedding):
    """Places nearer to each other by half, as subclasses of flash_attn's have it."""

    def _compute_inv_freq(self, device=None):
        return super()._compute_inv_freq(device) / 2


class Linear(rotary.RotaryEmbedding):
    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        at = torch.arange(seqlen, device=device, dtype=torch.float32) / 2
        angles = torch.outer(at, self._compute_inv_freq(device))
        self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("kind", [Scaled, Linear, "buffer", "half"])
def test_a_rotary_embedding_goes_by_its_buffer_and_methods(kind):
    embedding = (rotary.RotaryEmbedding if kind == "buffer" else Linear if kind is Linear else Scaled)(8)
    if kind == "buffer":
        embedding.inv_freq.div_(2)
    if kind == "half":
        embedding.half()  # the buffer is rounded, and made anew
    qkv = torch.randn(2, 5, 3, 2, 12)
    q, k = (turned(qkv[:, :, i], torch.arange(5).view(1, 5, 1) / 2, False).float() for i in range(2))
    found = embedding(qkv.clone())
    torch.testing.assert_close(found, torch.stack((q, k, qkv[:, :, 2]), dim=2), rtol=0, atol=1e-5)


def test_tables_of_a_rotary_embedding_are_kept():
    embedding = rotary.RotaryEmbedding(8)
    with torch.inference_mode():
        embedding(torch.randn(2, 5, 3, 2, 12))
    embedding(torch.randn(2, 5, 3, 2, 12).requires_grad_())
    known = embedding._cos_cached
    embedding(torch.randn(2, 4, 3, 2, 12))
    assert embedding._cos_cached is known and embedding._seq_len_cached == 5
    embedding(torch.randn(2, 4, 3, 2, 12), seqlen_offset=2)
    assert embedding._seq_len_cached == len(embedding._sin_cached) == 6


def test_xpos_scales_cancel_between_q_and_k():
    qkv = torch.randn(1, 6, 3, 1, 8)
    plain, scaled = (rotary.RotaryEmbedding(8, scale_base=base)(qkv.clone()) for base in (None, 16.0))
    assert not torch.allclose(plain, scaled)
    for embedded in (plain, scaled):
        embedded[:, :, 0] *= 1  # a view: both are read below
    scores = [torch.einsum("bshd,bshd->bsh", x[:, :, 0], x[:, :, 1]) for x in (plain, scaled)]
    torch.testing.assert_close(*scores)  # of a row with itself
