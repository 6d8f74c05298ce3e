"""Launches of small kernels: what arrives, and what is refused. See test_kernel_loader.py for what needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.cuda import device, kernel  # noqa: E402
from mini_vllm.ops.cuda.kernel import Kernel, LaunchError  # noqa: E402

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[3]

SOURCE = """
#include "types.cuh"
__global__ void echo(bool a, int32_t b, uint32_t c, float d, int64_t e, uint64_t f, double g, const void* h,
                     double* out) {
    out[0] = a, out[1] = b, out[2] = c, out[3] = d, out[4] = e, out[5] = f, out[6] = g, out[7] = h == nullptr;
}
__global__ void where(int* out) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}
__global__ void shared(int* out, int count) {
    extern __shared__ int memory[];
    __shared__ int more[256];
    for (int i = threadIdx.x; i < count; i += blockDim.x) memory[i] = i;
    more[threadIdx.x] = 7;
    __syncthreads();
    if (threadIdx.x == 0) out[0] = memory[count - 1] + more[255];
}
__global__ void trap() { __trap(); }
"""


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "types.cuh").write_text(
        "using int32_t = int; using uint32_t = unsigned;\n"
        "using int64_t = long long; using uint64_t = unsigned long long;\n"
    )
    (tmp_path / "test.cu").write_text(SOURCE)
    monkeypatch.setenv("MINI_VLLM_CUDA_SRC", str(tmp_path))


def test_every_scalar_type_arrives():
    out = cupy.zeros(8, np.float64)
    values = [np.bool_(True), np.int32(-5), np.uint32(4e9), np.float32(0.1), np.int64(-(2**40)), np.uint64(2**50)]
    Kernel("test.cu", "echo")((1,), (1,), [*values, np.float64(0.1), None, out])
    np.testing.assert_array_equal(cupy.asnumpy(out), [*map(np.float64, values), 0.1, 1.0])


def test_grid_and_block_of_one_to_three_axes():
    for grid, block in (((3,), (5,)), ((3, 2), (5, 4)), ((3, 2, 4), (5, 4, 2))):
        blocks, threads = int(np.prod(grid)), int(np.prod(block))
        out = cupy.zeros((blocks, threads), np.int32)
        Kernel("test.cu", "where")(grid, block, (out,))
        expected = np.arange(blocks)[:, None] * 1000 + np.arange(threads)
        np.testing.assert_array_equal(cupy.asnumpy(out), expected)
    with pytest.raises(ValueError, match="bad launch"):
        Kernel("test.cu", "where")((1, 1, 1, 1), (1,), (out,))


def test_neighbouring_blocks_form_clusters(sources, tmp_path):
    if device.DeviceInfo.of().compute_capability < (9, 0):
        pytest.skip("needs clusters")
    (tmp_path / "clusters.cu").write_text(
        """__global__ void f(int* out) {
            int size, rank;
            asm("mov.u32 %0, %%cluster_nctarank; mov.u32 %1, %%cluster_ctarank;" : "=r"(size), "=r"(rank));
            out[blockIdx.x] = 10 * size + rank;
        }"""
    )
    out = cupy.zeros(8, np.int32)
    for pdl in (False, True):
        for cluster, expected in ((4, [40, 41, 42, 43] * 2), (1, [10] * 8), (2, [20, 21] * 4)):
            Kernel("clusters.cu", "f", pdl=pdl)((8,), (1,), (out,), cluster=(cluster, 1))
            assert out.tolist() == expected
    with pytest.raises(LaunchError, match="failed with CUDA_ERROR"):
        Kernel("clusters.cu", "f")((8,), (1,), (out,), cluster=(3, 1))  # which does not divide the grid


def test_a_matrix_that_the_copy_engine_cannot_read_is_refused():
    if device.DeviceInfo.of().compute_capability < (9, 0):
        pytest.skip("needs tensor maps")
    matrix = cupy.zeros((4, 64), np.float16)
    assert kernel.TensorMap.of_matrix(matrix.data.ptr, 4, 64, 4).address % 64 == 0
    with pytest.raises(LaunchError, match=r"no tensor map of sizes \(60, 4\), strides \(120,\) in boxes of \(64, 4\)"):
        kernel.TensorMap.of_matrix(matrix.data.ptr, 4, 60, 4)


def test_nothing_is_launched_for_an_empty_grid():
    Kernel("test.cu", "trap")((0,), (1,), ())
    cupy.cuda.Device().synchronize()


def test_shared_memory_limit_is_raised_and_named():
    limit = device.get_max_shared_memory()
    out = cupy.zeros(1, np.int32)
    launch = Kernel("test.cu", "shared")
    for num_bytes in (1024, 47 << 10, 48 << 10, limit - 1024):  # the static part is 1 KiB
        count = num_bytes // 4
        launch((1,), (256,), (out, np.int32(count)), shared_memory=num_bytes)
        assert int(out[0]) == count + 6
    with pytest.raises(LaunchError, match=rf"shared \(test.cu\).*{limit} bytes of dynamic shared memory"):
        launch((1,), (256,), (out, np.int32(1)), shared_memory=limit)


def test_launches_go_to_the_stream_asked_for():
    stream = cupy.cuda.Stream(non_blocking=True)
    out = cupy.zeros((1, 4), np.int32)
    stream.begin_capture()
    Kernel("test.cu", "where")((1,), (4,), (out,), stream=stream)
    with stream:
        Kernel("test.cu", "where")((1,), (4,), (out,))
    graph = stream.end_capture()
    assert not out.any()  # recorded, not run
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(cupy.asnumpy(out), [[0, 1, 2, 3]])


def test_sync_mode_waits_but_not_in_a_capture(monkeypatch):
    monkeypatch.setattr(kernel, "SYNC", True)
    stream = cupy.cuda.Stream(non_blocking=True)
    out = cupy.zeros((1, 4), np.int32)
    with stream:
        Kernel("test.cu", "where")((1,), (4,), (out,))
        assert stream.done
        stream.begin_capture()
        Kernel("test.cu", "where")((1,), (4,), (out,))
        stream.end_capture()


def test_equal_kernels_share_one_function_and_report_their_resources():
    one, two = Kernel("test.cu", "where"), Kernel("test.cu", "where")
    assert one == two
    assert one.handle == two.handle
    assert Kernel("test.cu", "where", ["-DX=1"]) != one
    assert Kernel("test.cu", "shared").attributes.shared_bytes == 1024
    assert one.attributes.registers > 0


@pytest.mark.parametrize("sync", ["0", "1"])
def test_a_failing_kernel_is_named(sync, sources, tmp_path):
    """In a process of its own: the error is sticky, nothing runs on the device's context afterwards."""
    script = """
from mini_vllm.ops.cuda.kernel import Kernel, LaunchError
import cupy
try:
    Kernel("test.cu", "trap")((1,), (1,), ())
    cupy.cuda.Device().synchronize()
except (LaunchError, cupy.cuda.runtime.CUDARuntimeError) as error:
    print(error)
"""
    env = os.environ | {"MINI_VLLM_SYNC": sync, "MINI_VLLM_CUDA_SRC": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=ROOT)
    if sync == "1":
        assert run.stdout.startswith("trap (test.cu) failed with CUDA_ERROR_"), run.stderr
        assert "MINI_VLLM_SYNC" not in run.stdout
    else:
        assert "trap" not in run.stdout
        assert "cudaError" in run.stdout, run.stderr
