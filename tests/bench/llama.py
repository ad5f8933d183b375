"""A Llama training step in transformers, beside sdpa and FlashAttention-3: tests/bench/llama.py [--fa3-library F]

A model of 1B parameters of random weights (16 layers, 32 heads of 64 over 8 of keys), bf16, a batch of one: one
sequence of `--rows` tokens, and as many tokens of documents of 1024, packed. The contestants take turns. Of each: the
median of forward and backward in milliseconds, its peak of allocated memory, and its time over fa2gen's.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fa2gen.bench import peers
from fa2gen.integrations.transformers import register

DOCUMENT = 1024


class FlashAttention3(torch.autograd.Function):
    """out of its operators, without anything around them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        out, lse, *_ = torch.ops.flash_attn_3.fwd(q, k, v, **options, num_splits=1)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        torch.ops.flash_attn_3.bwd(dout, q, k, v, out, lse, *gradients, **ctx.options)
        return *gradients, None


def fa3_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **said: Any
) -> tuple[Tensor, None]:
    """transformers' attention function, causal."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    options = {"softmax_scale": said["scaling"], "is_causal": True}
    if (bounds := said.get("cu_seq_lens_q")) is None:
        return FlashAttention3.apply(q, k, v, options), None
    options |= {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    options |= {"max_seqlen_q": said["max_length_q"], "max_seqlen_k": said["max_length_k"]}
    return FlashAttention3.apply(q[0], k[0], v[0], options)[None], None


def contestants(library: Path | None) -> list[str]:
    from transformers import AttentionInterface, AttentionMaskInterface

    names = [register(), "sdpa"]
    _, missing = peers.find(["fa3"], library, "bwd")
    if missing:
        print(f"without FlashAttention-3: {missing['fa3']}")
        return names
    AttentionInterface.register("fa3-kernels", fa3_attention)
    AttentionMaskInterface.register("fa3-kernels", lambda **_: None)
    return [*names, "fa3-kernels"]


def step(model: Any, inputs: dict[str, Any]) -> tuple[float, float]:
    """(milliseconds, GiB at the peak) of a forward and backward pass."""
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    model(**inputs, use_cache=False).loss.backward()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), torch.cuda.max_memory_allocated() / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--fa3-library", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    names = contestants(given.fa3_library)
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    sizes |= {"num_hidden_layers": given.layers, "vocab_size": 32000, "max_position_embeddings": given.rows}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).bfloat16().train()
    ids = torch.randint(0, 32000, (1, given.rows), device="cuda")
    bounds = torch.arange(0, given.rows + 1, DOCUMENT, dtype=torch.int32, device="cuda")
    positions = {"position_ids": torch.arange(DOCUMENT, device="cuda").repeat(len(bounds) - 1).unsqueeze(0)}
    lengths = {f"cu_seq_lens_{side}": bounds for side in "qk"} | {f"max_length_{side}": DOCUMENT for side in "qk"}
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    for mode in ("one sequence", "packed documents"):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for at in range(given.rounds + 2):  # the first two warm up
            for name in names:
                model.set_attn_implementation(name)
                inputs = {"input_ids": ids, "labels": ids}
                if mode == "packed documents":  # sdpa has no other way than a mask of positions
                    inputs |= positions if name == "sdpa" else positions | lengths
                took = step(model, inputs)
                if at > 1:
                    found[name].append(took)
        ours = statistics.median(ms for ms, _ in found["fa2gen"])
        for name, steps in found.items():
            ms, peak = statistics.median(ms for ms, _ in steps), max(gib for _, gib in steps)
            print(f"{mode:16} {name:12} {ms:8.1f} ms  {peak:6.2f} GiB  {ms / ours:.3f} of fa2gen's time")


if __name__ == "__main__":
    main()
