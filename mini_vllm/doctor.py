"""What `mini-vllm doctor` finds out: can this machine run the CUDA backend, and if not, what mends it?"""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata
from typing import Any

import numpy as np

from mini_vllm import __version__
from mini_vllm.ops.cuda import CudaUnavailable, driver_cuda_version, require_cuda
from mini_vllm.ops.numpy_ops import NumpyOps


def examine() -> dict[str, Any]:
    """Facts about software and GPU, in sections of {name: value}; `verdict` and `cuda_available` sum them up.

    Nothing that is missing raises: it becomes a fact.
    """
    facts: dict[str, Any] = {
        "software": {
            "mini-vllm": __version__,
            "Python": platform.python_version(),
            "platform": platform.platform(),
            "NumPy": np.__version__,
            **_cuda_software(),
        }
    }
    try:
        require_cuda()
        facts["GPU"] = _gpu()
        facts["kernels"] = _hello_kernel()
    except CudaUnavailable as error:
        facts["cuda_available"] = False
        facts["verdict"] = f"No CUDA: {error}. The NumPy backend works on this machine."
    except Exception as error:  # a driver, compiler or kernel that fails in its own way is the finding
        facts["cuda_available"] = False
        facts["verdict"] = f"CUDA is installed but does not work: {type(error).__name__}: {error}"
    else:
        facts["cuda_available"] = True
        facts["verdict"] = "CUDA setup verified."
    return facts


def _cuda_software() -> dict[str, Any]:
    """Versions of the CUDA packages, and where their libraries and headers come from."""
    driver = driver_cuda_version()
    found: dict[str, Any] = {"driver serves CUDA": _version(driver) if driver else "no driver"}
    for package in ("cupy-cuda12x", "cupy-cuda13x", "cupy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["CuPy"] = f"{metadata.version(package)} ({package})"
    if "CuPy" not in found:
        return {**found, "CuPy": "not installed"}
    from mini_vllm.ops.cuda import compiler

    lookups = {
        "NVRTC": lambda: ".".join(map(str, compiler.nvrtc_version())),
        "NVRTC library": lambda: compiler.library_path("nvrtc"),
        "cuBLASLt library": lambda: compiler.library_path("cublasLt"),
        "CUDA headers": compiler.header_directory,
        "kernel sources": lambda: str(compiler.source_directory()),
    }
    for name, look_up in lookups.items():
        try:
            found[name] = look_up()
        except (RuntimeError, ValueError) as error:  # CudaUnavailable, or the loader's own
            found[name] = f"not found ({error})"
    return found


def _gpu() -> dict[str, Any]:
    from mini_vllm.ops.cuda.device import DeviceInfo, memory_info

    info = DeviceInfo.of()
    free, total = memory_info()
    return {
        "name": info.name,
        "compute capability": "{}.{}".format(*info.compute_capability),
        "multiprocessors": info.num_sms,
        "memory": f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free",
        "L2 cache": f"{info.l2_cache / 2**20:.0f} MiB",
        "threads per block": info.max_threads_per_block,
        "shared memory per block": f"{info.shared_memory_per_block >> 10} KiB ({info.max_shared_memory >> 10} opt-in)",
    }


def _hello_kernel() -> dict[str, Any]:
    """Compile an RMSNorm kernel, run it and compare it with NumPy."""
    from mini_vllm.ops.cuda.cuda_ops import CudaOps
    from mini_vllm.ops.cuda.kernel import cache

    x = np.random.default_rng(0).standard_normal((19, 256), np.float32)
    weight = np.ones(256, np.float32)
    ops = CudaOps(np.float32)
    out = ops.to_host(ops.rms_norm(ops.to_device(x), ops.to_device(weight), 1e-6))
    error = np.abs(out - NumpyOps().rms_norm(x, weight, 1e-6))
    if not error.max() < 1e-5:
        raise RuntimeError(f"the RMSNorm kernel is off by {error.max():.3g} from NumPy")
    entries, num_bytes = cache().info()
    return {
        "hello kernel": f"RMSNorm compiled, run, and equal to NumPy within {error.max():.1e}",
        "cache": f"{cache().directory}: {entries} kernels, {num_bytes / 2**20:.1f} MiB",
    }


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
