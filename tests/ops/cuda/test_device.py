"""DeviceInfo, timer, streams, tracked memory, buffers and uploads."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

from mini_vllm.ops.cuda import device, elementwise  # noqa: E402
from mini_vllm.ops.numpy_ops import NumpyOps  # noqa: E402
from mini_vllm.ops.weight import RepeatedBlock  # noqa: E402

pytestmark = pytest.mark.gpu


def test_device_info_agrees_with_itself():
    info = device.DeviceInfo.of()
    assert info == device.DeviceInfo.of(info.index)
    assert info.compute_capability >= (8, 0)
    assert device.get_num_sms() == info.num_sms > 0
    assert device.get_max_shared_memory() == info.max_shared_memory > info.shared_memory_per_block
    assert cupy.cuda.runtime.memGetInfo()[1] <= info.total_memory


def test_optimal_block_size_is_whole_warps():
    kernel = elementwise.instances([np.float32], [])[0]
    threads = device.get_optimal_block_size(kernel)
    assert threads % 32 == 0
    assert 32 <= threads <= 256  # its __launch_bounds__


def test_timer_measures_what_a_copy_takes():
    source = cupy.zeros(1 << 28, np.uint8)
    source.copy()
    with device.GPUTimer() as short:
        source.copy()
    with device.GPUTimer() as long:
        for _ in range(20):
            source.copy()
    assert 0 < short.elapsed_ms() < long.elapsed_ms()
    # 256 MiB read and written: no GPU's memory moves 20 TB/s.
    assert short.elapsed_ms() > 2**29 / 20e12 * 1e3


def test_stream_pool_goes_round():
    pool = device.StreamPool(3)
    assert len(pool) == 3
    assert pool.get(0) is pool.get(3) is not pool.get(1)
    with pool.get(1):
        x = cupy.arange(1000) * 2
    pool.synchronize_all()
    assert int(x[-1]) == 1998
    with pytest.raises(ValueError, match="at least 1 stream, got 0"):
        device.StreamPool(0)


def test_allocator_tracks_use_and_peak(capsys):
    allocator = device.GPUAllocator()
    with allocator.use():
        a = cupy.empty(1 << 20, np.uint8)
        b = cupy.empty(2 << 20, np.uint8)
    assert allocator.get_allocated() == allocator.get_peak() == 3 << 20
    del b
    assert allocator.get_allocated() == 1 << 20
    cupy.empty(8 << 20, np.uint8)  # from the default pool: not ours
    pointer = allocator.allocate(1 << 19)
    allocator.deallocate(pointer)
    assert allocator.get_allocated() == a.nbytes
    allocator.print_stats()
    assert capsys.readouterr().out == "GPU Memory: 1.0 MB allocated, 3.0 MB peak\n"
    assert allocator.get_reserved() >= 3 << 20
    del a
    allocator.release()
    assert allocator.get_reserved() == 0


def test_buffer_copies_both_ways():
    buffer = device.GPUBuffer((3, 4), np.int32)
    assert (buffer.size, buffer.bytes) == (12, 48)
    buffer.host[...] = np.arange(12).reshape(3, 4)
    buffer.fill(-1)
    buffer.copy_from_host(count=5)
    buffer.copy_to_host()
    cupy.cuda.Device().synchronize()
    np.testing.assert_array_equal(buffer.host.ravel(), [0, 1, 2, 3, 4, *[-1] * 7])


def test_buffer_hosts_take_turns():
    buffer = device.GPUBuffer(2, np.int32, num_hosts=3)
    for i, host in enumerate(buffer.hosts):
        host[...] = i
    for index in (1, 2, 0, 1):
        assert buffer.flip() == index
        assert buffer.host is buffer.hosts[index]
        buffer.copy_from_host()
        np.testing.assert_array_equal(buffer.data.get(), [index, index])


def test_uploads_survive_many_rounds_of_the_staging_buffer():
    staging = device.PinnedStaging(num_bytes=64 << 10)
    rng = np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    sent, received = [], []
    for i in range(400):
        array = rng.integers(0, 100, rng.integers(0, 3000)).astype(rng.choice([np.int32, np.float32, np.uint8]))
        sent.append(array.copy())
        with stream if i % 50 > 40 else cupy.cuda.Stream.null:
            received.append(staging.upload(array))
        array[...] = 0  # the caller may reuse its array at once
    cupy.cuda.Device().synchronize()
    for expected, actual in zip(sent, received, strict=True):
        np.testing.assert_array_equal(cupy.asnumpy(actual), expected)


@pytest.mark.parametrize("shape", [(), (0, 4), (5, 7), (300, 300)])
def test_uploads_keep_shape_and_values(shape):
    staging = device.PinnedStaging(num_bytes=64 << 10)
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for view in (array, array.T):
        actual = staging.upload(view)
        assert actual.shape == view.shape
        np.testing.assert_array_equal(cupy.asnumpy(actual), view)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_repeated_blocks_are_those_of_numpy(dtype):
    block = np.random.default_rng(0).standard_normal(1_048_573, np.float32)
    parts = [
        RepeatedBlock(block, 1_000_003, (700, 3001)),
        np.ones((2, 3001), np.float32),
        RepeatedBlock(block, 5, (3, 3001)),
    ]
    actual = device.WeightUpload().upload(parts, np.dtype(dtype)).get()
    np.testing.assert_array_equal(actual, NumpyOps(dtype).load_weight(parts))
