"""What inference engines call: the functions of vLLM's fork of flash-attention, and of SGLang's kernels, by keyword.

`fa2gen.serving.vllm` has `flash_attn_varlen_func` and `get_scheduler_metadata` as `vllm.vllm_flash_attn` has them,
`fa2gen.serving.sglang` `flash_attn_with_kvcache` and `flash_attn_varlen_func` as `sgl_kernel.flash_attn` has them: same
names of arguments, defaults, shapes and results. Each call runs the kernels that suit it, those of decoding where each
sequence has a few queries, else those of prefill over pages. Nothing here waits for the device, and a CUDA graph may be
replayed with other lengths and tables.
"""

from __future__ import annotations

from fa2gen.serving.sglang import flash_attn_with_kvcache
from fa2gen.serving.vllm import flash_attn_varlen_func, get_scheduler_metadata

__all__ = ["flash_attn_varlen_func", "flash_attn_with_kvcache", "get_scheduler_metadata"]
