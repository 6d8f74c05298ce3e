"""Every kernel that the backend launches compiles for every supported architecture, cleanly: no GPU needed.

Ampere and Ada share one code path and are complete with sm_80 (where float16 is served by the same instructions as
bfloat16), Hopper and Blackwell with sm_90a; the others are compiled for the data type and head sizes most in use. What
has been compiled before comes from the user's cache, whose key covers everything the code depends on.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("cupy")

from mini_vllm.ops.cuda import elementwise
from mini_vllm.ops.cuda.cuda_ops import instances
from mini_vllm.ops.cuda.kernel import DTYPES, compile_all

FLOAT, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
COVERAGE = {
    "sm_80": ([FLOAT, BF16], elementwise.HEAD_DIMS),
    "sm_90a": (DTYPES, elementwise.HEAD_DIMS),
    **dict.fromkeys(("sm_86", "sm_89", "sm_100a", "sm_120a"), ([BF16], (64, 128))),
}

EXPLAINED = {
    # Some tens of bytes. Untuned: no Blackwell GPU was at hand to say what would be faster.
    ("sm_100a", "flash_attention<bf16, 128, 2, 64> (flash_attention.cu)"),
    # 8 bytes a thread. Ampere and Ada wait for their own choice of tiles.
    *(
        (arch, f"gemv_mma<bf16, {out}, 1, 16, 4, false> (gemv.cu)")
        for arch in ("sm_80", "sm_86", "sm_89")
        for out in ("bf16", "float")
    ),
    # Some tens of bytes, as above.
    *(
        (arch, f"decode_attention<bf16, 128, {shape}> (decode_attention.cu)")
        for arch in ("sm_100a", "sm_120a")
        for shape in ("8, 8, 1", "8, 4, 1", "4, 8, 1", "4, 4, 2")
    ),
}
"""Kernels that keep something in local memory on an architecture, and why they may."""


@pytest.mark.parametrize("arch", COVERAGE)
def test_every_kernel_compiles_without_spills_or_warnings(arch):
    kernels = instances(*COVERAGE[arch])
    compile_all(kernels, arch)
    flaws = []
    for kernel in kernels:
        cubin = kernel.compile(arch)
        if cubin.warnings:
            flaws.append(f"{kernel}: {cubin.warnings}")
        spills = cubin.resources.stack_bytes or cubin.resources.spill_bytes
        if spills and (arch, repr(kernel)) not in EXPLAINED:
            flaws.append(f"{kernel}: {cubin.resources}")
    assert not flaws, "\n".join(flaws)


@pytest.mark.parametrize("head_dim", [2, 20, 46, 112, 192, 250])
def test_rope_compiles_for_unusual_head_sizes(head_dim):
    kernels = [kernel for kernel in elementwise.instances(DTYPES, [head_dim]) if kernel.file == "rope.cu"]
    assert len(kernels) == len(DTYPES)
    compile_all(kernels, "sm_90a")
    for kernel in kernels:
        resources = kernel.compile("sm_90a").resources
        assert resources.stack_bytes == resources.spill_bytes == 0, f"{kernel}: {resources}"
