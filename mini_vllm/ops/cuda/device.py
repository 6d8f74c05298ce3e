"""The GPU itself: what it is, and small tools around it (timing, streams, tracked memory, uploads)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cupy
import cupyx
import numpy as np
from cupy.cuda import runtime

from mini_vllm.ops.cuda.kernel import Kernel
from mini_vllm.ops.weight import RepeatedBlock


@dataclass(frozen=True)
class DeviceInfo:
    """The facts about one GPU that choose kernels and grids, and that `mini-vllm doctor` shows. Sizes in bytes."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    num_sms: int
    total_memory: int
    l2_cache: int
    max_threads_per_block: int
    shared_memory_per_block: int  # without asking
    max_shared_memory: int  # a block's opt-in limit
    driver_version: int  # the newest CUDA that the driver serves: 1000 major + 10 minor

    @staticmethod
    def of(index: int | None = None) -> DeviceInfo:
        """The GPU with this index, by default the current one."""
        index = runtime.getDevice() if index is None else index
        properties = runtime.getDeviceProperties(index)
        return DeviceInfo(
            index=index,
            name=properties["name"].decode(),
            compute_capability=(properties["major"], properties["minor"]),
            num_sms=properties["multiProcessorCount"],
            total_memory=properties["totalGlobalMem"],
            l2_cache=properties["l2CacheSize"],
            max_threads_per_block=properties["maxThreadsPerBlock"],
            shared_memory_per_block=properties["sharedMemPerBlock"],
            max_shared_memory=properties["sharedMemPerBlockOptin"],
            driver_version=runtime.driverGetVersion(),
        )


def pci_bus_id() -> str:
    """Of the current device, as nvidia-smi takes it; its index is another one there under CUDA_VISIBLE_DEVICES."""
    return cupy.cuda.Device().pci_bus_id


def memory_info() -> tuple[int, int]:
    """(free, total) bytes of the current GPU; what CuPy's pools keep for later counts as used."""
    return runtime.memGetInfo()


def nvtx_push(name: str) -> None:
    """Open a named range that NVIDIA's profilers show, on this thread."""
    cupy.cuda.nvtx.RangePush(name)


def nvtx_pop() -> None:
    """Close the range opened last."""
    cupy.cuda.nvtx.RangePop()


def free_cached_memory() -> None:
    """Give back what CuPy's default pools keep for later."""
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.get_default_pinned_memory_pool().free_all_blocks()


def get_num_sms(index: int | None = None) -> int:
    """Streaming multiprocessors of a GPU, by default the current one."""
    return DeviceInfo.of(index).num_sms


def get_max_shared_memory(index: int | None = None) -> int:
    """The most shared memory in bytes that a block can get; `Kernel` raises the kernel's limit by itself."""
    return DeviceInfo.of(index).max_shared_memory


def get_optimal_block_size(kernel: Kernel, shared_memory: int = 0) -> int:
    """Threads a block that keep most warps of a kernel resident, with that many bytes of dynamic shared memory."""
    _, threads = cupy.cuda.driver.occupancyMaxPotentialBlockSize(kernel.handle, shared_memory, 0)
    return threads


class GPUTimer:
    """Milliseconds between two points of a stream, by CUDA events.

    >>> with GPUTimer() as timer:
    ...     kernel(grid, block, args)
    >>> timer.elapsed_ms()
    """

    def __init__(self) -> None:
        self._start, self._stop = cupy.cuda.Event(), cupy.cuda.Event()

    def start(self, stream: cupy.cuda.Stream | None = None) -> None:
        self._start.record(stream)

    def stop(self, stream: cupy.cuda.Stream | None = None) -> None:
        self._stop.record(stream)

    def elapsed_ms(self) -> float:
        """Waits until the stop has been reached."""
        self._stop.synchronize()
        return cupy.cuda.get_elapsed_time(self._start, self._stop)

    def __enter__(self) -> GPUTimer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class StreamPool:
    """A fixed number of streams, handed out in turn."""

    def __init__(self, num_streams: int = 4) -> None:
        if num_streams < 1:
            raise ValueError(f"a StreamPool needs at least 1 stream, got {num_streams}")
        self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(num_streams)]

    def __len__(self) -> int:
        return len(self._streams)

    def get(self, index: int) -> cupy.cuda.Stream:
        """Stream number `index` modulo the size of the pool."""
        return self._streams[index % len(self._streams)]

    def synchronize_all(self) -> None:
        for stream in self._streams:
            stream.synchronize()


class GPUAllocator:
    """A CuPy memory pool of its own that knows its peak.

    Within `with allocator.use():` the arrays that this thread makes come from it. A CUDA graph needs such a pool:
    the addresses that it captured must not serve anyone else while it lives, so its owner keeps the allocator.
    """

    def __init__(self) -> None:
        self._pool = cupy.cuda.MemoryPool()
        self._peak = 0

    @contextlib.contextmanager
    def use(self) -> Iterator[GPUAllocator]:
        with cupy.cuda.using_allocator(self.allocate):
            yield self

    def allocate(self, num_bytes: int) -> cupy.cuda.MemoryPointer:
        """Memory that goes back to the pool with the last reference to it, or by `deallocate`."""
        pointer = self._pool.malloc(num_bytes)
        self._peak = max(self._peak, self._pool.used_bytes())
        return pointer

    def deallocate(self, pointer: cupy.cuda.MemoryPointer) -> None:
        pointer.mem.free()

    def get_allocated(self) -> int:
        """Bytes in use."""
        return self._pool.used_bytes()

    def get_peak(self) -> int:
        """The most bytes that were in use at a time."""
        return self._peak

    def get_reserved(self) -> int:
        """Bytes taken from the device, in use or kept for later."""
        return self._pool.total_bytes()

    def release(self) -> None:
        """Give what is not in use back to the device."""
        self._pool.free_all_blocks()

    def print_stats(self) -> None:
        print(f"GPU Memory: {self.get_allocated() / 2**20:.1f} MB allocated, {self._peak / 2**20:.1f} MB peak")


class GPUBuffer:
    """A device array with a pinned twin on the host: copies between them are asynchronous and may be captured.

    Attributes:
        data: the CuPy array.
        hosts: pinned NumPy arrays of the same shape and dtype.
        host: one of them. Between a copy and the next synchronisation it belongs to the GPU; `flip` makes the next
            one `host`, so that it can be filled while copies of the last one are still under way.
    """

    def __init__(self, shape: int | tuple[int, ...], dtype: np.dtype | type, num_hosts: int = 1) -> None:
        self.data = cupy.empty(shape, dtype)
        self.hosts = [cupyx.empty_pinned(shape, dtype) for _ in range(num_hosts)]
        self._index = 0

    @property
    def host(self) -> np.ndarray:
        return self.hosts[self._index]

    def flip(self) -> int:
        """Go on to the next of `hosts`; returns its index."""
        self._index = (self._index + 1) % len(self.hosts)
        return self._index

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data.size

    @property
    def bytes(self) -> int:
        return self.data.nbytes

    def copy_from_host(self, count: int | None = None) -> None:
        """Enqueue host to data on the current stream: the first `count` elements, by default all."""
        self._copy(self.data.data.ptr, self.host.ctypes.data, runtime.memcpyHostToDevice, count)

    def copy_to_host(self, count: int | None = None) -> None:
        """Enqueue data to host on the current stream: the first `count` elements, by default all."""
        self._copy(self.host.ctypes.data, self.data.data.ptr, runtime.memcpyDeviceToHost, count)

    def upload_rows(self, rows: np.ndarray) -> None:
        """Enqueue a block of rows to the top left corner of a 2-D buffer; the rest stays as it is."""
        height, width = rows.shape
        self.host[:height, :width] = rows
        pitch, row_bytes = self.data.strides[0], width * self.data.itemsize
        stream = cupy.cuda.get_current_stream().ptr
        target, source = self.data.data.ptr, self.host.ctypes.data
        runtime.memcpy2DAsync(target, pitch, source, pitch, row_bytes, height, runtime.memcpyHostToDevice, stream)

    def fill(self, value: float) -> None:
        """Set all elements of `data`."""
        self.data.fill(value)

    def _copy(self, target: int, source: int, kind: int, count: int | None) -> None:
        num_bytes = (self.size if count is None else count) * self.data.itemsize
        runtime.memcpyAsync(target, source, num_bytes, kind, cupy.cuda.get_current_stream().ptr)


def pinned_zeros(shape: tuple[int, ...], dtype: np.dtype) -> cupy.ndarray:
    """Zeros in pinned host memory as a CuPy array: kernels read and write them over the bus, at its speed."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    # Not from CuPy's pool of pinned memory, which would take the next power of two.
    host = cupy.cuda.PinnedMemoryPointer(cupy.cuda.PinnedMemory(num_bytes), 0)
    np.frombuffer(host, np.uint8, num_bytes)[:] = 0
    device = cupy.cuda.Device().id  # asking the driver for it would fail for memory that is not a device's
    memory = cupy.cuda.UnownedMemory(host.ptr, num_bytes, host, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


class Download:
    """Asynchronous copies of the first elements of a device array to the host, for one thread.

    Two pinned buffers take turns, so a copy may be read until the one after the next is started.
    """

    def __init__(self, size: int, dtype: np.dtype | type) -> None:
        self._hosts = [cupyx.empty_pinned(size, dtype) for _ in range(2)]
        self._done = [cupy.cuda.Event(block=False, disable_timing=True) for _ in range(2)]
        self._next = 0

    def start(self, data: cupy.ndarray, count: int) -> Callable[[], np.ndarray]:
        """Enqueue a copy of data[:count] on the current stream. The result waits for it and returns it."""
        host, done = self._hosts[self._next], self._done[self._next]
        self._next = 1 - self._next
        stream = cupy.cuda.get_current_stream()
        num_bytes = count * data.itemsize
        runtime.memcpyAsync(host.ctypes.data, data.data.ptr, num_bytes, runtime.memcpyDeviceToHost, stream.ptr)
        done.record(stream)

        def wait() -> np.ndarray:
            done.synchronize()
            return host[:count]

        return wait


class PinnedStaging:
    """Asynchronous uploads of small arrays through one pinned buffer, for one thread.

    The buffer has two halves. Uploads fill one after the other; before a half is filled again, its copies of the
    last round are waited for, which takes no time unless megabytes are under way.
    """

    _ALIGNMENT = 256

    def __init__(self, num_bytes: int = 8 << 20) -> None:
        self._half_bytes = num_bytes // 2
        self._halves = [cupyx.empty_pinned(self._half_bytes, np.uint8) for _ in range(2)]
        self._done = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._active, self._used = 0, 0
        self._stream = cupy.cuda.get_current_stream()

    def upload(self, host: np.ndarray) -> cupy.ndarray:
        """A copy of `host` on the device, ordered on the current stream. `host` may be changed at once.

        Arrays larger than half the buffer are copied directly, which waits for the copy.
        """
        device = cupy.empty(host.shape, host.dtype)
        if host.nbytes > self._half_bytes:
            device.set(np.ascontiguousarray(host))
            return device
        if host.nbytes == 0:
            return device
        stream = cupy.cuda.get_current_stream()
        if stream.ptr != self._stream.ptr:  # the events order copies of one stream only
            self._stream.synchronize()
            self._stream = stream
        if self._used + host.nbytes > self._half_bytes:
            self._done[self._active].record(stream)
            self._active, self._used = 1 - self._active, 0
            self._done[self._active].synchronize()

        staged = self._halves[self._active][self._used : self._used + host.nbytes]
        self._used += -(-host.nbytes // self._ALIGNMENT) * self._ALIGNMENT
        staged = staged.view(host.dtype).reshape(host.shape)
        staged[...] = host
        runtime.memcpyAsync(device.data.ptr, staged.ctypes.data, host.nbytes, runtime.memcpyHostToDevice, stream.ptr)
        return device


class WeightUpload:
    """Large uploads, converted on the way, through a ring of two pinned buffers.

    While one buffer is on its way to the GPU the other is filled, from memory-mapped files for instance. CuPy's
    own staging would pin the next power of two of every tensor, and pageable copies run at a tenth of the speed.
    """

    def __init__(self, num_bytes: int = 64 << 20) -> None:
        self._ring = [cupyx.empty_pinned(num_bytes, np.uint8) for _ in range(2)]
        self._done = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self._next = 0
        self._block: tuple[np.ndarray, cupy.ndarray] | None = None  # a RepeatedBlock's: on the host, on the device

    def upload(self, parts: Sequence[np.ndarray | RepeatedBlock], dtype: np.dtype) -> cupy.ndarray:
        """The parts, stacked along their first axis, on the device in `dtype`."""
        out = cupy.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype)
        target = out.data.ptr
        stream = cupy.cuda.get_current_stream()
        for part in parts:
            if isinstance(part, RepeatedBlock):
                target += self._repeat(target, part, dtype)
                continue
            flat = part.reshape(-1)
            chunk = self._ring[0].nbytes // dtype.itemsize
            for start in range(0, flat.size, chunk):
                values = flat[start : start + chunk]
                staged = self._ring[self._next].view(dtype)[: values.size]
                self._done[self._next].synchronize()
                staged[:] = values
                runtime.memcpyAsync(target, staged.ctypes.data, staged.nbytes, runtime.memcpyHostToDevice, stream.ptr)
                self._done[self._next].record(stream)
                self._next = 1 - self._next
                target += staged.nbytes
        return out

    def _repeat(self, target: int, part: RepeatedBlock, dtype: np.dtype) -> int:
        """Write a repeated block to this address by copies on the device. Returns its bytes."""
        if self._block is None or self._block[0] is not part.block or self._block[1].dtype != dtype:
            self._block = part.block, self.upload([part.block], dtype)
        stream, block = cupy.cuda.get_current_stream().ptr, self._block[1].data.ptr
        itemsize, num_bytes = dtype.itemsize, 0
        for to, from_block, offset, count in part.copies():
            source = (block if from_block else target) + offset * itemsize
            runtime.memcpyAsync(target + to * itemsize, source, count * itemsize, runtime.memcpyDeviceToDevice, stream)
            num_bytes += count * itemsize
        return num_bytes
