"""Kernel: one instance of a `__global__` function, compiled on first use and launched with its arguments checked."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cupy
import ml_dtypes
import numpy as np
from cupy.cuda import runtime
from tqdm import tqdm

from mini_vllm.ops.cuda import compiler
from mini_vllm.ops.cuda.compiler import Cubin, Parameter, Resources
from mini_vllm.ops.cuda.cubin_cache import CubinCache

logger = logging.getLogger(__name__)

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
"""The data types that every kernel is written for."""

_TYPE_NAMES = dict(zip(DTYPES, ("float", "fp16", "bf16"), strict=True))

SYNC = os.environ.get("MINI_VLLM_SYNC") == "1"
"""Wait for each kernel after its launch, so that an error is raised at the launch that caused it."""


class LaunchError(RuntimeError):
    """A launch that the driver refused, or a kernel that failed; the message names kernel, grid and arguments."""


def type_name(dtype: np.dtype) -> str:
    """How common.cuh calls a data type: "float", "fp16" or "bf16"."""
    dtype = np.dtype(dtype)
    name = _TYPE_NAMES.get(dtype)
    if name is None:
        raise ValueError(f"the CUDA kernels take float32, float16 and bfloat16, not {dtype}")
    return name


def device_arch() -> str:
    """The compiler's name of the current device's architecture, with all its instructions: "sm_86", "sm_90a"."""
    capability = cupy.cuda.Device().compute_capability
    return f"sm_{capability}{'a' if int(capability) >= 90 else ''}"


@functools.cache
def cache() -> CubinCache:
    """The user's cache of compiled kernels."""
    return CubinCache()


class Kernel:
    """One instance of a kernel template. Making one costs nothing: it is compiled and loaded when first needed.

    Equal kernels (same file, name and options) share one loaded function for each device.

    Attributes:
        file: a .cu file, relative to the source directory.
        name: an NVRTC name expression, such as "rms_norm<bf16>".
        options: further compiler flags, such as "-DBLOCK=64".
        pdl: launch with programmatic stream serialization (Hopper and later): the kernel may start while the one
            before it finishes, and must call griddepcontrol_wait() as common.cuh says.
        prefers_shared_memory: over L1 cache. A multiprocessor runs kernels side by side only while they agree on how
            its memory is divided between the two, so this belongs to kernels that follow one another.
    """

    def __init__(
        self,
        file: str,
        name: str,
        options: Sequence[str] = (),
        *,
        pdl: bool = False,
        prefers_shared_memory: bool = False,
    ) -> None:
        self.file, self.name, self.options, self.pdl = file, name, tuple(options), pdl
        self.prefers_shared_memory = prefers_shared_memory
        self._functions: dict[int, _Function] = {}  # by device id

    def __repr__(self) -> str:
        return f"{self.name} ({self.file}{''.join(f' {option}' for option in self.options)})"

    def _identity(self) -> tuple:
        return self.file, self.name, self.options, self.pdl, self.prefers_shared_memory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kernel) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def cached(self, arch: str) -> Cubin | None:
        """The compiled kernel, if it is in the cache."""
        source = compiler.flatten(self.file)
        entry = cache().get(compiler.cache_key(source, self.name, self.options, arch))
        return None if entry is None else Cubin.from_bytes(entry)

    def compile(self, arch: str | None = None) -> Cubin:
        """The compiled kernel, from the cache or from the compiler.

        Args:
            arch: "sm_80", "sm_90a", ...; by default the current device's. With it, no GPU is needed.

        Raises:
            CompileError: the compiler's messages, with file and line.
            ValueError: no such file or kernel.
        """
        arch = arch or device_arch()
        if (cubin := self.cached(arch)) is None:
            source = compiler.flatten(self.file)
            cubin = compiler.compile_cubin(source, self.file, self.name, self.options, arch)
            cache().put(compiler.cache_key(source, self.name, self.options, arch), cubin.to_bytes())
        return cubin

    def _load(self, device: int, cubin: Cubin | None = None) -> _Function:
        key = (*self._identity(), device)
        with _loaded_lock:
            function = _loaded.get(key)
        if function is None:
            function = _Function(self, cubin or self.compile(), device)
            with _loaded_lock:
                function = _loaded.setdefault(key, function)
        self._functions[device] = function
        return function

    @property
    def attributes(self) -> Resources | None:
        """Registers, static shared memory, stack and spills on the current device, if the compiler reported them."""
        return self._load(runtime.getDevice()).cubin.resources

    @property
    def handle(self) -> int:
        """The CUfunction on the current device, for the driver's own calls."""
        return self._load(runtime.getDevice()).handle

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared_memory: int = 0,
        stream: cupy.cuda.Stream | None = None,
        cluster: tuple[int, int] = (1, 1),
    ) -> None:
        """Launch the kernel; nothing waits for it, nothing is allocated, so it may be captured into a graph.

        Args:
            grid: blocks, 1 to 3 numbers; with a 0 among them nothing is launched. block: threads, likewise.
            args: one for each parameter: a C-contiguous CuPy array of the parameter's type on the current device
                (or None, a null pointer) for a pointer, a NumPy scalar of exactly its type for a number, a
                TensorMap.
            shared_memory: dynamic shared memory of a block in bytes; the limit is raised as needed.
            stream: by default CuPy's current stream.
            cluster: so many neighbouring blocks along x and y run at the same time (Hopper and later; at most 8).

        Raises:
            ValueError: arguments that do not fit the kernel's signature.
            LaunchError: what the driver says.
        """
        device = runtime.getDevice()
        function = self._functions.get(device) or self._load(device)
        stream_pointer = (cupy.cuda.get_current_stream() if stream is None else stream).ptr
        function.launch(grid, block, args, shared_memory, stream_pointer, cluster)


_loaded: dict[tuple, _Function] = {}
_loaded_lock = threading.Lock()


def compile_all(kernels: Iterable[Kernel], arch: str | None = None) -> float:
    """Compile what the cache lacks in parallel, and load everything on the current device unless `arch` is given.

    Says in one line of the log if something had to be compiled; on a terminal a progress bar shows above it.

    Args:
        kernels: in any order; equal ones count once.
        arch: compile for this architecture only, without a GPU.

    Returns:
        The seconds spent compiling; 0.0 if everything was cached.

    Raises:
        CompileError, ValueError: as `Kernel.compile`.
    """
    target = arch or device_arch()
    cubins = {kernel: kernel.cached(target) for kernel in kernels}
    missing = [kernel for kernel, cubin in cubins.items() if cubin is None]
    seconds = 0.0
    if missing:
        start = time.perf_counter()
        # NVRTC releases the GIL while it compiles.
        with ThreadPoolExecutor(max_workers=min(len(missing), os.cpu_count() or 1)) as pool:
            compiled = pool.map(lambda kernel: kernel.compile(target), missing)
            # disable=None: only on terminals
            bar = tqdm(compiled, "Compiling CUDA kernels", len(missing), leave=False, disable=None)
            cubins.update(zip(missing, bar, strict=True))
        cache().trim()
        seconds = time.perf_counter() - start
        where = f"not cached: {cache().problem}" if cache().problem else f"cached in {cache().directory}"
        logger.info("Compiled %d CUDA kernels for %s in %.1f s, %s.", len(missing), target, seconds, where)
    if arch is None:
        device = runtime.getDevice()
        for kernel, cubin in cubins.items():
            kernel._load(device, cubin)
    return seconds


# ---- the driver -------------------------------------------------------------------------------------------------
#
# Launches call the driver directly: CuPy has no cuLaunchKernelEx, which programmatic dependent launch needs, and
# its own launch checks no arguments and takes twice as long.

_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID
_MAX_DYNAMIC_SHARED_SIZE_BYTES, _PREFERRED_SHARED_MEMORY_CARVEOUT = 8, 9  # CUfunction_attribute
_DEFAULT_SHARED_MEMORY = 48 << 10  # what a block gets without raising the first of them

# CUlaunchConfig: grid x y z, block x y z, shared bytes, stream, attributes, number of attributes.
_CONFIG = struct.Struct("@7I4xQQI4x")
_ATTRIBUTE = struct.Struct("@I4x3I52x")  # CUlaunchAttribute: id, value

# The first letter is struct's code; each argument gets 8 bytes.
_PACKED = {
    np.dtype(np.int32): "i4x",
    np.dtype(np.uint32): "I4x",
    np.dtype(np.int64): "q",
    np.dtype(np.uint64): "Q",
    np.dtype(np.float32): "f4x",
    np.dtype(np.float64): "d",
    np.dtype(np.bool_): "?7x",
}


@functools.cache
def _driver() -> ctypes.PyDLL:
    """libcuda. As a PyDLL it keeps the GIL: giving it up for 2 us could cost a thread switch of milliseconds."""
    driver = ctypes.PyDLL("libcuda.so.1")
    driver.cuLaunchKernelEx.argtypes = (ctypes.c_void_p,) * 4
    driver.cuTensorMapEncodeTiled.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_void_p),
        *(ctypes.c_void_p,) * 4,
        *(ctypes.c_int,) * 4,
    )
    driver.cuFuncSetAttribute.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    driver.cuStreamIsCapturing.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    driver.cuStreamSynchronize.argtypes = (ctypes.c_void_p,)
    return driver


def _error_text(code: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(name))
    _driver().cuGetErrorString(code, ctypes.byref(text))
    return f"{(name.value or b'CUDA error %d' % code).decode()}: {(text.value or b'unknown').decode()}"


def _describe(arg: Any) -> str:
    if isinstance(arg, (cupy.ndarray, np.ndarray)):
        order = "" if arg.flags.c_contiguous else " not contiguous"
        return f"{type(arg).__module__.split('.')[0]} {arg.dtype}{list(arg.shape)}{order}"
    return "None" if arg is None else f"{type(arg).__name__}({arg})"


class TensorMap:
    """How the copy engine of Hopper and later reads an array: in boxes of rows of 128 bytes, swizzled.

    See wgmma.cuh. The array has a 16-bit type and lies at `address`; that and all strides are multiples of 16 bytes. It
    must live as long as launches with the map.

    Args:
        address: of the first element.
        sizes: in elements, the innermost dimension first.
        strides: in bytes, of all dimensions but the innermost, whose elements are neighbours.
        box: sizes of a box, but for the innermost, of which it has 64 elements.
        l2_bytes: 128 or 256, how much of memory is fetched when a part of it is wanted.

    Raises:
        LaunchError: the driver refuses them.
    """

    _UINT16, _NO_INTERLEAVE, _SWIZZLE_128, _ZEROS = 1, 0, 3, 0
    _L2_128, _L2_256 = 2, 3
    _ALIGNMENT = 64
    _BOX_COLUMNS = 64

    def __init__(
        self, address: int, sizes: Sequence[int], strides: Sequence[int], box: Sequence[int], l2_bytes: int = 256
    ) -> None:
        rank, box = len(sizes), (self._BOX_COLUMNS, *box)
        self._buffer = ctypes.create_string_buffer(128 + self._ALIGNMENT)
        start = ctypes.addressof(self._buffer)
        self.address = start + -start % self._ALIGNMENT
        code = _driver().cuTensorMapEncodeTiled(
            self.address, self._UINT16, rank, address, (ctypes.c_uint64 * rank)(*sizes),
            (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank), self._NO_INTERLEAVE, self._SWIZZLE_128,
            {128: self._L2_128, 256: self._L2_256}[l2_bytes], self._ZEROS,
        )  # fmt: skip
        if code:
            raise LaunchError(
                f"no tensor map of sizes {sizes}, strides {strides} in boxes of {box}: {_error_text(code)}"
            )

    @classmethod
    def of_matrix(cls, address: int, rows: int, columns: int, box_rows: int) -> TensorMap:
        """Of a matrix [rows, columns] without gaps, in boxes of `box_rows` rows and 64 columns."""
        return cls(address, (columns, rows), (2 * columns,), (box_rows,))


class _Function:
    """A kernel loaded on one device: packs arguments and launches."""

    def __init__(self, kernel: Kernel, cubin: Cubin, device: int) -> None:
        self.kernel, self.cubin, self.device = kernel, cubin, device
        self._arguments = Arguments(repr(kernel), cubin.parameters, device)
        self._module = cupy.cuda.Module()  # unloaded when it dies, so it is kept
        self._module.load(cubin.image)
        self.handle = self._module.get_function(cubin.lowered_name).ptr
        self._shared_limit = _DEFAULT_SHARED_MEMORY - (cubin.resources.shared_bytes if cubin.resources else 0)
        if kernel.prefers_shared_memory:  # a hint: as much as there is, in percent
            _driver().cuFuncSetAttribute(self.handle, _PREFERRED_SHARED_MEMORY_CARVEOUT, 100)

        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._config_address = ctypes.addressof(self._config)
        self._attributes = ctypes.create_string_buffer(2 * _ATTRIBUTE.size)
        self._num_attributes = 0
        if kernel.pdl and int(cupy.cuda.Device(device).compute_capability) >= 90:
            _ATTRIBUTE.pack_into(self._attributes, 0, _PROGRAMMATIC_STREAM_SERIALIZATION, 1, 0, 0)
            self._num_attributes = 1
        self._lock = threading.Lock()  # the driver copies the buffers during the call, so they can be used again

    def launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared_memory: int,
        stream: int,
        cluster: tuple[int, int] = (1, 1),
    ) -> None:
        if 0 in grid:
            return
        values = self._arguments.check(args)
        if shared_memory > self._shared_limit:
            code = _driver().cuFuncSetAttribute(self.handle, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_memory)
            if code:
                self._fail(code, grid, block, args, shared_memory)
            self._shared_limit = shared_memory
        with self._lock:
            num_attributes = self._num_attributes
            if cluster != (1, 1):
                offset = num_attributes * _ATTRIBUTE.size
                _ATTRIBUTE.pack_into(self._attributes, offset, _CLUSTER_DIMENSION, *cluster, 1)
                num_attributes += 1
            try:
                _CONFIG.pack_into(
                    self._config, 0, *grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block)),
                    shared_memory, stream, ctypes.addressof(self._attributes), num_attributes,
                )  # fmt: skip
                self._arguments.pack(values)
            except (struct.error, TypeError) as error:
                raise ValueError(f"{self.kernel}: bad launch, grid {grid}, block {block}: {error}") from None
            code = _driver().cuLaunchKernelEx(self._config_address, self.handle, self._arguments.address, None)
        if code == 0 and SYNC:
            code = _synchronize(stream)
        if code:
            self._fail(code, grid, block, args, shared_memory)

    def _fail(self, code: int, grid: tuple, block: tuple, args: Sequence[Any], shared_memory: int) -> None:
        described = ", ".join(
            f"{parameter.name}={_describe(arg)}" for parameter, arg in zip(self.cubin.parameters, args, strict=True)
        )
        hint = "" if SYNC else ". If an earlier kernel failed, MINI_VLLM_SYNC=1 finds it"
        raise LaunchError(
            f"{self.kernel} failed with {_error_text(code)}; grid {grid}, block {block}, "
            f"{shared_memory} bytes of dynamic shared memory, arguments: {described}{hint}"
        )


def _synchronize(stream: int) -> int:
    """Wait for a stream, unless it is being captured. Returns the driver's error code."""
    capturing = ctypes.c_int()
    code = _driver().cuStreamIsCapturing(stream, ctypes.addressof(capturing))
    return code or (0 if capturing.value else _driver().cuStreamSynchronize(stream))


class Arguments:
    """The checked and packed arguments of one kernel: what the driver's `void** kernelParams` points to."""

    def __init__(self, kernel: str, parameters: Sequence[Parameter], device: int) -> None:
        self._kernel, self._parameters, self._device = kernel, tuple(parameters), device
        for parameter in parameters:
            if not parameter.is_pointer and parameter.dtype not in (*_PACKED, None):
                known = ", ".join(dtype.name for dtype in _PACKED)
                raise ValueError(f"{kernel}: scalar {parameter.name} is {parameter.dtype}; kernels take {known}")
        codes = ("Q" if p.is_pointer or p.dtype is None else _PACKED[p.dtype] for p in parameters)
        self._layout = struct.Struct("=" + "".join(codes))
        self.buffer = ctypes.create_string_buffer(max(self._layout.size, 1))
        start = ctypes.addressof(self.buffer)
        self.handles = (ctypes.c_void_p * len(parameters))(*range(start, start + self._layout.size, 8))
        self.address = ctypes.addressof(self.handles)
        # What check() compares with, as plain tuples: attribute access would double its time.
        self._expected = [(p.is_pointer, p.dtype, p.dtype.type if p.dtype else TensorMap) for p in parameters]
        self._maps = [i for i, p in enumerate(parameters) if not p.is_pointer and p.dtype is None]

    def check(self, args: Sequence[Any]) -> list:
        """The values to pack: addresses and numbers. Raises ValueError, naming the parameter."""
        if len(args) != len(self._expected):
            raise ValueError(f"{self._kernel} takes {len(self._expected)} arguments, {len(args)} were given")
        device, ndarray, values = self._device, cupy.ndarray, []
        for (is_pointer, dtype, scalar_type), arg in zip(self._expected, args, strict=True):
            if not is_pointer:
                if type(arg) is not scalar_type:
                    self._refuse(len(values), arg)
                values.append(arg)
            elif arg is None:
                values.append(0)
            elif isinstance(arg, ndarray):
                data = arg.data
                # _c_contiguous is what flags.c_contiguous reads, at a tenth of its time.
                wrong_dtype = dtype is not None and arg.dtype != dtype
                if wrong_dtype or not arg._c_contiguous or data.device_id != device:
                    self._refuse(len(values), arg)
                values.append(data.ptr)
            else:
                self._refuse(len(values), arg)
        return values

    def pack(self, values: list) -> None:
        for i in self._maps:  # the driver copies a map from where it lies
            self.handles[i] = values[i].address
            values[i] = 0
        self._layout.pack_into(self.buffer, 0, *values)

    def _refuse(self, index: int, arg: Any) -> None:
        parameter = self._parameters[index]
        if not parameter.is_pointer and parameter.dtype is None:
            needed = "a TensorMap"
        elif not parameter.is_pointer:
            needed = f"np.{parameter.dtype.name}(...), a NumPy scalar of exactly that type"
        else:
            dtype = "" if parameter.dtype is None else f"{parameter.dtype} "
            needed = f"a C-contiguous {dtype}cupy array on device {self._device}, or None"
        where = f" on device {arg.data.device_id}" if isinstance(arg, cupy.ndarray) else ""
        raise ValueError(
            f"{self._kernel}: argument {index} ({parameter.name}) is {_describe(arg)}{where}; needed is {needed}"
        )
