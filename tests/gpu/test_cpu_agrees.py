"""The CPU's model of the machine: the kernels that templates/cpu runs give what the GPU gives.

The same rendered kernel, tiling and inputs. The two differ in ex2, lg2 and rcp, which the GPU approximates (2^-22
relative), and in the order in which a matrix product sums: so a rounded P or O may fall on the other side. The bound is
two roundings of the output's dtype at its own size, and 1e-5 for LSE.
"""

from __future__ import annotations

import pytest
import torch

from fa2gen.errors import Fa2GenError
from fa2gen.features import examples_of
from fa2gen.ops import forward_into
from fa2gen.spec import KernelSpec
from fa2gen.testing import run_on_cpu

# Every swizzle, fragment and copy that the templates use: head dims that fill their panels and that do not.
NAMES = (
    "fa2_fwd_sm90_bf16_d64_causal_m192_n128_s3_w12",
    "fa2_fwd_sm90_fp16_d72_m128_n128_s2_w8_z32",
    "fa2_fwd_sm90_bf16_d96_causal_m128_n80_s2_w8_z64",
    "fa2_fwd_sm90_bf16_d128_causal_m192_n80_s2_w12_r1",
    "fa2_fwd_sm90_fp16_d200_m128_n80_s2_w8_r1",
    "fa2_fwd_sm90_bf16_d256_m128_n80_s2_w8",
    "fa2_fwd_sm80_fp16_d40_causal_m128_n64_s2_w4",
    "fa2_fwd_sm80_bf16_d96_m128_n64_s2_w4_z64",
    "fa2_fwd_sm80_bf16_d128_causal_m128_n64_s1_w4",
)


@pytest.mark.parametrize("name", NAMES)
def test_same_kernel_same_numbers(name):
    spec = KernelSpec.from_name(name)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[spec.problem.dtype]
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 203, 4), (2, 390, 2), (2, 390, 2))
    q, k, v = (torch.randn(*shape, spec.problem.head_dim, generator=generator).to(dtype) for shape in shapes)
    try:
        expected, expected_lse, _ = run_on_cpu(spec, q, k, v, examples_of(spec.problem)[0])
    except Fa2GenError as error:
        if "compiler" in str(error):
            pytest.skip(str(error))
        raise
    q, k, v = q.cuda(), k.cuda(), v.cuda()
    out, lse = torch.full_like(q, torch.nan), torch.full((2, 4, 203), torch.nan, device="cuda")
    forward_into(out, lse, q, k, v, causal=spec.problem.mask == "causal", tiling=spec.tiling, arch=spec.tiling.arch)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu(), expected, rtol=2 * rounding, atol=2 * rounding)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=0, atol=1e-5)
