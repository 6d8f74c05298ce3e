"""The CUDA backend. Importing this package imports no CuPy: ask `require_cuda` before using the modules in it."""

from __future__ import annotations

import ctypes
import os

MIN_COMPUTE_CAPABILITY = (8, 0)  # Ampere: cp.async and bfloat16 tensor cores


class CudaUnavailable(RuntimeError):
    """CUDA cannot be used here; the message is one sentence that says why and what to do."""


def driver_cuda_version() -> int | None:
    """The newest CUDA that the NVIDIA driver serves, as 1000 major + 10 minor; None where there is no driver."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return version.value


def install_hint() -> str:
    """The pip command that installs CuPy, NVRTC, cuBLAS and CUDA's headers for this machine's driver."""
    version = driver_cuda_version()
    extra = "cuda12" if version is not None and version < 13000 else "cuda13"
    return f'install them with: pip install "mini-vllm[{extra}]"'


def require_cuda() -> None:
    """Return if a GPU can be used.

    Raises:
        CudaUnavailable: what is missing and what mends it: driver, CuPy, GPU, compute capability, NVRTC, headers.
    """
    driver = driver_cuda_version()
    if driver is None:
        raise CudaUnavailable("there is no NVIDIA driver on this machine (libcuda.so.1 was not found)")
    try:
        import ml_dtypes  # noqa: F401  CuPy knows bfloat16 only if this is importable
        from cupy.cuda import runtime
    except ImportError as error:
        raise CudaUnavailable(f"CuPy cannot be imported ({error}); {install_hint()}") from error

    built_for = runtime.runtimeGetVersion()
    if driver // 1000 < built_for // 1000:
        raise CudaUnavailable(
            f"the NVIDIA driver serves CUDA {driver // 1000}.{driver % 1000 // 10} but the installed CuPy is for CUDA "
            f"{built_for // 1000}: update the driver, or uninstall that CuPy and {install_hint()}"
        )
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise CudaUnavailable(f"the NVIDIA driver finds no GPU ({error}){_visible_devices()}") from error
    if count == 0:
        raise CudaUnavailable(f"the NVIDIA driver finds no GPU{_visible_devices()}")

    properties = runtime.getDeviceProperties(runtime.getDevice())
    capability = (properties["major"], properties["minor"])
    if capability < MIN_COMPUTE_CAPABILITY:
        raise CudaUnavailable(
            f"{properties['name'].decode()} has compute capability {capability[0]}.{capability[1]}; the kernels need "
            f"8.0 or higher (Ampere, 2020, or newer)"
        )

    from mini_vllm.ops.cuda import compiler

    version = compiler.nvrtc_version()
    compiler.header_directory()
    from cupy_backends.cuda.libs import nvrtc

    if 10 * capability[0] + capability[1] not in nvrtc.getSupportedArchs():
        raise CudaUnavailable(
            f"NVRTC {version[0]}.{version[1]} does not know compute capability {capability[0]}.{capability[1]} of this "
            "GPU: upgrade it with: pip install --upgrade cuda-toolkit[cublas,cudart,nvrtc]"
        )


def _visible_devices() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
