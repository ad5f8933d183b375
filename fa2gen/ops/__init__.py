"""The PyTorch door: the functions of flash_attn 2.8, and behind them the operators `fa2gen::fwd` and `fa2gen::bwd`,
`fwd_varlen` and `bwd_varlen` of ragged batches, `fwd_general` and `bwd_general` of calls with further tensors, and
`decode` and `decode_append` over caches.

Shapes everywhere: q (batch, seqlen_q, heads, head_dim); k, v (batch, seqlen_k, heads_kv, head_dim), heads a multiple of
heads_kv; v may have a head dim of its own; out like q with v's head dim, contiguous; lse (batch, heads, seqlen_q), in
fp32, the natural logarithm of the softmax sums. fp16 or bf16, any strides with a contiguous last dimension. A causal
mask is aligned to the bottom right. A row that sees no key has out 0 and lse -inf (flash_attn 2 says +inf there;
flash_attn 3 and every merge of partial results want -inf).
"""

from __future__ import annotations

from fa2gen.ops.call import forget
from fa2gen.ops.flash import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)
from fa2gen.ops.flash_kvcache import flash_attn_with_kvcache
from fa2gen.ops.flash_varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from fa2gen.ops.merge import merge_states
from fa2gen.ops.operator import attention, forward_into
from fa2gen.ops.paged_append import reshape_and_cache

__all__ = [
    "attention",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "forget",
    "forward_into",
    "merge_states",
    "reshape_and_cache",
]
