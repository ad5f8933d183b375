"""torch's own attention and transformers on a GPU: kernels of fa2gen are what runs there, and it is no less exact."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

import fa2gen
from fa2gen import UnsupportedProblem
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
    from fa2gen.integrations.transformers import attention, register
    from tests.transformers_zoo import SEQLEN, ZOO, Routes

    MAJOR = int(transformers.__version__.partition(".")[0])
    ZOO = [animal for animal in ZOO if animal.since <= MAJOR]
LLAMA = [animal for animal in ZOO if animal.model_type == "llama"]


def model_of(animal, implementation, like=None, dtype=torch.float32, head_dim=64):
    register()
    model = animal.build(implementation, head_dim if animal.kind == "decoder" else None).cuda()
    if like is not None:
        model.load_state_dict(like.state_dict())
    return model.to(dtype)


def outcome(model, inputs, weights=None):
    """(what a model says, gradients), in fp32."""
    out = model(**inputs)
    said = (out.logits if "logits" in out else out.last_hidden_state).float()
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape == said.shape[:2]:
        said = said * mask.unsqueeze(-1)
    model.zero_grad()
    weights = torch.randn(said.shape, generator=torch.Generator().manual_seed(1)).cuda()
    (said * weights).sum().backward()
    grads = [p.grad.float().flatten() for p in model.parameters() if p.grad is not None]
    return said.detach(), torch.cat(grads)


def modes_of(animal):
    inputs = {name: x.cuda() for name, x in animal.inputs(batch=4).items()}
    yield "dense", inputs
    if animal.kind != "vision":
        mask = torch.ones(4, SEQLEN, dtype=torch.long, device="cuda")
        mask[0, :6] = mask[1, :3] = 0
        yield "padded", {**inputs, "attention_mask": mask}
    if animal.kind == "decoder" and animal.runs == "fa2gen":
        positions = torch.cat([torch.arange(n) for n in (5, 9, SEQLEN - 14)]).expand(4, -1).cuda()
        yield "packed", {**inputs, "position_ids": positions, "use_cache": False}


@pytest.mark.parametrize("animal", ZOO, ids=str)
def test_a_model_is_as_exact_as_with_eager_attention(animal, record_property):
    """Logits and gradients in bf16, within 1.1 times the mean error of eager attention in bf16, by the same experts."""
    exact = model_of(animal, "eager")
    eager, model = (model_of(animal, name, exact, torch.bfloat16) for name in ("eager", "fa2gen"))
    for mode, inputs in modes_of(animal):
        floats = inputs | {"pixel_values": inputs["pixel_values"].bfloat16()} if animal.kind == "vision" else inputs
        with attention.recorded() as calls, Routes(inputs.get("attention_mask")) as routes, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            right = outcome(exact, inputs)
            routes.again()
            theirs, others = outcome(eager, floats), [routes.others]
            routes.again()
            try:
                found, others = outcome(model, floats), [*others, routes.others]
            except UnsupportedProblem as refusal:
                assert animal.needs and any(name in str(refusal) for name in animal.needs), refusal
                print(f"{animal.model_type:20} {mode:7} refused: {str(refusal)[:70]}")
                return
        runs = {call.runs for call in calls.values()}
        assert runs == {animal.runs}
        if mode == "packed" and animal.model_type in ("gpt_oss", "opt"):
            continue  # their eager attention does not keep packed sequences apart
        ratios = []
        for i, name in enumerate(("logits", "gradients")):
            errors = [(x[i] - right[i]).abs().mean().item() for x in (found, theirs)]
            ratios.append(errors[0] / max(errors[1], 1e-12))
            if runs == {"sdpa"}:
                continue  # transformers' own
            assert ratios[-1] <= 1.1, f"{mode}: error of {name} {errors[0]:.2e}, eager's {errors[1]:.2e}"
        routed = f" elsewhere: eager {others[0]}, fa2gen {others[1]} tokens" if any(others) else ""
        print(f"{animal.model_type:20} {mode:7} {'/'.join(runs):6} {ratios[0]:.2f} {ratios[1]:.2f}{routed}")


@pytest.mark.parametrize("animal", LLAMA, ids=str)
def test_transformers_run_our_kernels(animal):
    model = model_of(animal, "fa2gen", dtype=torch.bfloat16)
    for _, inputs in modes_of(animal):
        assert kernels_of(lambda inputs=inputs: outcome(model, inputs)) >= {"fa2_fwd", "fa2_bwd"}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("animal", [x for x in ZOO if x.model_type in ("llama", "gemma3_text")], ids=str)
def test_generate_gives_sdpas_tokens(animal, cache):
    """But where two tokens are as near to each other as bf16 is."""
    exact = model_of(animal, "eager")
    models = [model_of(animal, name, exact, torch.bfloat16) for name in ("sdpa", "fa2gen")]
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
