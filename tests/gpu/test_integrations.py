"""torch's own attention and transformers on a GPU: kernels of fa2gen are what runs there, and it is no less exact."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import fa2gen
from fa2gen.reference import check, check_gradients

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def kernels_of(call) -> set[str]:
    """Names of the attention kernels that a call launches, by pass; of other makers' the whole name."""
    call()  # compiles
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    names = {event.key for event in profiled.key_averages() if "CUDA" in str(event.device_type)}
    others = [n for n in names if not n.startswith(("fa2_", "triton_"))]  # inductor's are named by what they surround
    return {n[:7] for n in names if n.startswith("fa2_")} | {
        n for n in others if any(word in n.lower() for word in ("flash", "cudnn", "fmha", "softmax"))
    }


def leaves(*shape, bshd=True, heads=(8, 2, 2)):
    batch, seqlen, head_dim = shape
    torch.manual_seed(0)
    xs = [torch.randn(batch, seqlen, n, head_dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in heads]
    return [(x if bshd else x.contiguous()).requires_grad_() for x in xs]


@pytest.mark.parametrize("bshd", [True, False], ids=["bshd", "bhsd"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sdpa_runs_our_kernels(bshd, compiled):
    q, k, v = leaves(2, 333, 64, bshd=bshd)
    dout = torch.randn_like(q)

    def attend(q, k, v):
        return scaled_dot_product_attention(q * 1.0, k, v, is_causal=True, enable_gqa=True) * 1.0

    run = torch.compile(attend, fullgraph=True) if compiled else attend
    found = []

    def step():
        out = run(q, k, v)
        found[:] = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]

    with fa2gen.enable_sdpa():
        assert kernels_of(step) == {"fa2_fwd", "fa2_bwd"}
    out, *grads = (x.transpose(1, 2) for x in found)
    given = [x.detach().transpose(1, 2) for x in (q, k, v)]
    lse = fa2gen.attention(*given, causal=True)[1]
    assert (verdict := check(out, lse, *given, causal=True)).ok, verdict
    verdict = check_gradients(tuple(grads), dout.transpose(1, 2), *given, causal=True)
    assert verdict.ok, verdict
    assert kernels_of(step).isdisjoint({"fa2_fwd"}) or compiled, "undone"


def test_varlen_attn_runs_our_kernels():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    bounds = torch.tensor([0, 100, 100, 357], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(357, 4, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    found = []

    def step():
        out = varlen.varlen_attn(q, k, v, bounds, bounds, 257, 257)
        found[:] = [out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    with fa2gen.enable_sdpa():
        assert kernels_of(step) == {"fa2_fwd", "fa2_bwd"}
    out = fa2gen.flash_attn_varlen_func(q, k, v, bounds, bounds)
    expected = [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
    for x, right in zip(found, expected, strict=True):
        torch.testing.assert_close(x, right, rtol=0, atol=1e-2)


# transformers -----------------------------------------------------------------------------------------------------

try:
    import transformers
except ImportError:
    ZOO = []
else:
    from fa2gen.integrations.transformers import register
    from tests.transformers_zoo import SEQLEN, ZOO, errors, modes, outcome

    MAJOR = int(transformers.__version__.partition(".")[0])
    ZOO = [animal for animal in ZOO if animal.since <= MAJOR]
LLAMA = [animal for animal in ZOO if animal.model_type == "llama"]


@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_a_model_is_as_exact_as_with_eager_attention(animal):
    """Logits and gradients in bf16, within 1.1 times the mean error of eager attention in bf16."""
    register()
    for found in errors(animal, "cuda"):
        print(f"{animal.model_type:20} {found}")
        assert found.runs == {animal.runs}
        # sdpa is transformers' own.
        assert animal.runs == "sdpa" or max(found.logits, found.gradients) <= 1.1, found


def model_of(animal, implementation):
    register()
    return animal.build(implementation, 64).cuda()


@pytest.mark.parametrize("animal", LLAMA, ids=str)
def test_transformers_run_our_kernels(animal):
    model = model_of(animal, "fa2gen").bfloat16()
    for _, inputs in modes(animal, "cuda"):
        assert kernels_of(lambda inputs=inputs: outcome(model, inputs)) >= {"fa2_fwd", "fa2_bwd"}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("animal", [x for x in ZOO if x.model_type in ("llama", "gemma3_text")], ids=str)
def test_generate_gives_sdpas_tokens(animal, cache):
    """But where two tokens are as near to each other as bf16 is."""
    exact = model_of(animal, "eager")
    models = [model_of(animal, name).bfloat16() for name in ("sdpa", "fa2gen")]
    ids = animal.inputs(batch=4)["input_ids"].cuda()
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    said = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": mask}
    said |= {"cache_implementation": "static"} if cache == "static" else {}
    theirs, ours = (model.generate(ids, **said) for model in models)
    for row in range(len(ids)):
        differs = (theirs[row] != ours[row]).nonzero().flatten().tolist()
        if differs:
            end = differs[0]
            logits = exact(
                theirs[row : row + 1, :end],
                attention_mask=torch.nn.functional.pad(mask[row : row + 1], (0, end - SEQLEN), value=1),
            ).logits[0, -1]
            assert (logits[theirs[row, end]] - logits[ours[row, end]]).abs() < 0.02 * logits.abs().max()
