"""The kernel loader without a GPU: the compiler is the real one, only the driver is absent."""

from __future__ import annotations

import dataclasses
import logging
import os
import stat
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

cupy = pytest.importorskip("cupy")

import ml_dtypes  # noqa: E402

import mini_vllm.ops.cuda as cuda  # noqa: E402
from mini_vllm.ops.cuda import compiler, cubin_cache, kernel  # noqa: E402
from mini_vllm.ops.cuda.compiler import CompileError, Cubin, Parameter, parse_signature  # noqa: E402
from mini_vllm.ops.cuda.cubin_cache import CubinCache  # noqa: E402
from mini_vllm.ops.cuda.kernel import Arguments, Kernel, TensorMap, compile_all  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]
ARCH = "sm_80"

SCALE = """#include "helper.cuh"
template <typename T, int N>
__global__ void scale(const T* x, T* y, float factor) { y[threadIdx.x] = twice(x[threadIdx.x]) * T(factor) + T(N); }
__global__ void other(int* x) { x[0] = 1; }
"""
HELPER = """#pragma once
template <typename T>
__device__ T twice(T x) { return x + x; }
"""


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A kernel directory of one file and one header, in use."""
    directory = tmp_path / "src"
    (directory / "include").mkdir(parents=True)
    (directory / "scale.cu").write_text(SCALE)
    (directory / "include" / "helper.cuh").write_text(HELPER)
    monkeypatch.setenv("MINI_VLLM_CUDA_SRC", str(directory))
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> CubinCache:
    """An empty cache of its own for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kernel.cache.cache_clear()
    yield kernel.cache()
    kernel.cache.cache_clear()


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The names compiled so far: what the cache did not have."""
    names = []
    compile_cubin = compiler.compile_cubin

    def counted(source, file, name, options, arch):
        names.append(name)
        return compile_cubin(source, file, name, options, arch)

    monkeypatch.setattr(compiler, "compile_cubin", counted)
    return names


# ---- source ---------------------------------------------------------------------------------------------------


def test_flatten_marks_lines_and_includes_once(sources):
    (sources / "include" / "a.cuh").write_text('#pragma once\n#include "helper.cuh"\nint a;\n')
    (sources / "two.cu").write_text('#include "a.cuh"\n#include "helper.cuh"\n#include <cuda_fp16.h>\nint two;\n')
    assert compiler.flatten("two.cu").splitlines() == [
        '#line 1 "two.cu"',
        '#line 1 "include/a.cuh"',
        "",
        '#line 1 "include/helper.cuh"',
        "",
        *HELPER.splitlines()[1:],
        '#line 3 "include/a.cuh"',
        "int a;",
        '#line 2 "two.cu"',
        '#line 3 "two.cu"',
        "#include <cuda_fp16.h>",
        "int two;",
    ]


def test_flatten_names_what_is_missing(sources):
    (sources / "bad.cu").write_text('\n#include "nowhere.cuh"\n')
    with pytest.raises(ValueError, match=r'bad.cu\(2\): #include "nowhere.cuh": no such file in .*src and .*include'):
        compiler.flatten("bad.cu")
    with pytest.raises(ValueError, match=r"no kernel file 'none.cu' in .*src; there are: bad.cu, scale.cu"):
        compiler.flatten("none.cu")


def test_source_directory_must_exist(monkeypatch):
    monkeypatch.setenv("MINI_VLLM_CUDA_SRC", "/no/such/directory")
    with pytest.raises(ValueError, match="MINI_VLLM_CUDA_SRC=/no/such/directory: no such directory"):
        compiler.source_directory()
    monkeypatch.delenv("MINI_VLLM_CUDA_SRC")
    assert (compiler.source_directory() / "include" / "common.cuh").is_file()


# ---- compiling --------------------------------------------------------------------------------------------------


def test_compile_gives_machine_code_and_its_description(sources):
    cubin = Kernel("scale.cu", "scale<float, 3>").compile(ARCH)
    assert cubin.image.startswith(b"\x7fELF")
    assert cubin.lowered_name.startswith("_Z5scaleIfLi3EEv")
    assert cubin.parameters == (
        Parameter("x", True, np.dtype(np.float32)),
        Parameter("y", True, np.dtype(np.float32)),
        Parameter("factor", False, np.dtype(np.float32)),
    )
    assert cubin.resources.registers > 0
    assert cubin.resources.spill_bytes == cubin.resources.shared_bytes == 0
    assert cubin.warnings == ""


def test_resources_are_those_of_the_named_kernel(sources):
    """One file may hold several kernels that are not templates; all of them are in the compiler's report."""
    (sources / "two.cu").write_text(
        "__global__ void small(int* x) { x[0] = 1; }\n"
        "__global__ void large(int* x) {\n"
        "  __shared__ int s[1000]; int local[400];\n"
        "  for (int i = 0; i < 400; ++i) local[i] = s[i] = x[i];\n"
        "  __syncthreads();\n"
        "  x[0] = local[x[1]] + s[x[2]];\n"
        "}\n"
    )
    large, small = (Kernel("two.cu", name).compile(ARCH).resources for name in ("large", "small"))
    assert (large.shared_bytes, small.shared_bytes) == (4000, 0)
    assert (large.stack_bytes, small.stack_bytes) == (1600, 0)
    assert large.registers > small.registers


def test_compile_errors_show_file_line_and_text(sources):
    (sources / "include" / "helper.cuh").write_text(HELPER + "__device__ int f() { return undefined_name; }\n")
    with pytest.raises(CompileError) as error:
        Kernel("scale.cu", "scale<float, 3>").compile(ARCH)
    message = str(error.value)
    assert f"cannot compile scale<float, 3> for sm_80 from {sources}/scale.cu" in message
    assert 'include/helper.cuh(4): error: identifier "undefined_name" is undefined' in message

    (sources / "include" / "helper.cuh").write_text(HELPER)
    (sources / "scale.cu").write_text(SCALE + "syntax error;\n")
    with pytest.raises(CompileError, match=r"scale\.cu\(5\): error"):
        Kernel("scale.cu", "scale<float, 3>").compile(ARCH)


def test_unknown_kernels_architectures_and_options(sources):
    with pytest.raises(ValueError, match=r"scale.cu: no kernel 'scael'; the file has: other, scale"):
        Kernel("scale.cu", "scael<float, 3>").compile(ARCH)
    with pytest.raises(CompileError, match="cannot compile"):
        Kernel("scale.cu", "scale<float>").compile(ARCH)  # a template argument is missing
    with pytest.raises(CompileError, match="sm_12"):
        Kernel("scale.cu", "other").compile("sm_12")
    with pytest.raises(CompileError, match="--no-such-option"):
        Kernel("scale.cu", "other", ["--no-such-option"]).compile(ARCH)


def test_a_compiler_that_reports_no_resources_is_no_obstacle(sources, cache):
    """As NVRTC does when it takes the code from the driver's cache, or if its report changes."""
    resources, warnings = compiler._read_log("scale.cu(1): warning\nptxas info : all new format\n\0", "_Z5other")
    assert (resources, warnings) == (None, "scale.cu(1): warning")
    cubin = dataclasses.replace(Kernel("scale.cu", "other").compile(ARCH), resources=None)
    assert Cubin.from_bytes(cubin.to_bytes()) == cubin


def test_warnings_are_kept(sources):
    (sources / "scale.cu").write_text("__global__ void f(int* x) { int unused; x[0] = 1; }\n")
    assert 'scale.cu(1): warning #177-D: variable "unused"' in Kernel("scale.cu", "f").compile(ARCH).warnings


# ---- cache ------------------------------------------------------------------------------------------------------


def test_second_compile_comes_from_the_cache(sources, cache, compilations):
    first = Kernel("scale.cu", "scale<float, 3>").compile(ARCH)
    assert cache.info()[0] == 1
    assert Kernel("scale.cu", "scale<float, 3>").compile(ARCH) == first
    assert len(compilations) == 1


def test_whatever_changes_the_code_changes_the_key(sources, compilations, monkeypatch):
    def compile_again(name="scale<float, 3>", options=(), arch=ARCH):
        Kernel("scale.cu", name, options).compile(arch)
        Kernel("scale.cu", name, options).compile(arch)
        return len(compilations)

    assert compile_again() == 1
    assert compile_again(name="scale<float, 4>") == 2
    assert compile_again(options=["-DX=1"]) == 3
    assert compile_again(arch="sm_86") == 4
    (sources / "include" / "helper.cuh").write_text(HELPER.replace("x + x", "x * T(2)"))
    assert compile_again() == 5
    (sources / "scale.cu").write_text(SCALE.replace("T(N)", "T(N + 1)"))
    assert compile_again() == 6
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    assert compile_again() == 7
    monkeypatch.setattr(compiler, "_header_digest", lambda: "an upgrade of cuda_fp16.h")
    assert compile_again() == 8


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data + b"\0",
    ],
    ids=["empty", "half", "short", "flipped bit", "long"],
)
def test_damaged_entries_are_compiled_anew(sources, cache, compilations, damage):
    first = Kernel("scale.cu", "scale<float, 3>").compile(ARCH)
    (entry,) = cache.directory.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert Kernel("scale.cu", "scale<float, 3>").compile(ARCH) == first
    assert Kernel("scale.cu", "scale<float, 3>").compile(ARCH) == first
    assert len(compilations) == 2  # and the entry is whole again


def test_cache_is_private(sources, cache):
    os.umask(umask := os.umask(0))
    Kernel("scale.cu", "other").compile(ARCH)
    assert stat.S_IMODE(cache.directory.stat().st_mode) == 0o700 & ~umask
    (entry,) = cache.directory.iterdir()
    assert stat.S_IMODE(entry.stat().st_mode) == 0o600 & ~umask


def test_a_directory_open_to_others_is_not_used(sources, cache, compilations, caplog):
    cache.directory.mkdir(parents=True)
    cache.directory.chmod(0o770)
    with caplog.at_level(logging.WARNING):
        Kernel("scale.cu", "other").compile(ARCH)
        Kernel("scale.cu", "other").compile(ARCH)
    assert len(compilations) == 2
    assert list(cache.directory.iterdir()) == []
    (record,) = caplog.records  # said once
    assert f"chmod 700 {cache.directory}" in record.getMessage()


def test_a_directory_of_another_user_is_not_used(sources, cache, compilations, monkeypatch, caplog):
    Kernel("scale.cu", "other").compile(ARCH)
    monkeypatch.setattr(cubin_cache.os, "getuid", lambda: os.geteuid() + 1)
    Kernel("scale.cu", "other").compile(ARCH)
    assert len(compilations) == 2
    assert "belongs to another user" in caplog.text


def test_links_are_not_followed(sources, cache, compilations, tmp_path):
    """Neither an entry nor the directory may be a link to something that others can write."""
    Kernel("scale.cu", "other").compile(ARCH)
    (entry,) = cache.directory.iterdir()
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    Kernel("scale.cu", "other").compile(ARCH)
    assert len(compilations) == 2
    assert not entry.is_symlink()  # replaced, and what it pointed to is untouched

    cache.directory.rename(tmp_path / "moved")
    cache.directory.symlink_to(tmp_path / "moved")
    Kernel("scale.cu", "other").compile(ARCH)
    assert len(compilations) == 3


@pytest.mark.parametrize("call", ["mkdir", "open", "write"])
def test_a_disk_that_takes_nothing_costs_only_time(sources, cache, compilations, monkeypatch, caplog, call):
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if call == "mkdir":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif call == "write":
        monkeypatch.setattr(cubin_cache.os, "replace", refuse)
    else:
        os_open = os.open
        monkeypatch.setattr(
            cubin_cache.os,
            "open",
            lambda p, flags, *a, **k: refuse() if flags & os.O_CREAT else os_open(p, flags, *a, **k),
        )
    Kernel("scale.cu", "other").compile(ARCH)
    Kernel("scale.cu", "other").compile(ARCH)
    assert len(compilations) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"The kernel cache {cache.directory} is not used: cannot write to it (No space left on device)."
    ]
    assert not cache.directory.exists() or list(cache.directory.iterdir()) == []  # no temporary file is left


def test_a_read_only_cache_still_serves(sources, cache, compilations, monkeypatch):
    Kernel("scale.cu", "other").compile(ARCH)
    monkeypatch.setattr(cubin_cache.os, "utime", lambda file: (_ for _ in ()).throw(OSError(30, "Read-only")))
    Kernel("scale.cu", "other").compile(ARCH)
    assert len(compilations) == 1


def test_trim_deletes_what_was_used_longest_ago(cache):
    for name, age in (("old", 300), ("used", 200), ("new", 100)):
        cache.put(name, bytes(1000))
        time = os.stat(cache.directory / name).st_mtime - age
        os.utime(cache.directory / name, (time, time))
    assert cache.get("used") == bytes(1000)
    cache.trim(max_bytes=2100)
    assert sorted(os.listdir(cache.directory)) == ["new", "used"]
    assert cache.info() == (2, 2 * (1000 + 32))
    cache.clear()
    assert cache.info() == (0, 0)


def test_default_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cubin_cache.default_directory() == tmp_path / "mini_vllm" / "kernels"
    monkeypatch.setenv("HOME", "/home/someone")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cubin_cache.default_directory() == Path("/home/someone/.cache/mini_vllm/kernels")


def test_eight_processes_at_once(sources, cache):
    script = (
        "from mini_vllm.ops.cuda.kernel import Kernel\n"
        "from hashlib import sha256\n"
        "for n in (1, 2, 3):\n"
        f"    print(sha256(Kernel('scale.cu', f'scale<float, {{n}}>').compile('{ARCH}').image).hexdigest())\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    assert len({out for out, _ in outputs}) == 1
    assert len(os.listdir(cache.directory)) == 3  # one entry a kernel, no temporary files


# ---- compile_all --------------------------------------------------------------------------------------------------


def test_compile_all_compiles_what_is_missing_and_says_so_once(sources, cache, compilations, caplog):
    caplog.set_level(logging.INFO)
    kernels = [Kernel("scale.cu", f"scale<float, {n}>") for n in (1, 2, 3)]
    kernels[0].compile(ARCH)
    compilations.clear()
    assert compile_all([*kernels, *kernels], ARCH) > 0
    assert sorted(compilations) == ["scale<float, 2>", "scale<float, 3>"]
    assert len(caplog.records) == 1
    assert "Compiled 2 CUDA kernels for sm_80 in" in caplog.text
    assert f"cached in {cache.directory}" in caplog.text
    assert compile_all(kernels, ARCH) == 0.0
    assert len(caplog.records) == 1


def test_compile_all_raises_what_a_kernel_raises(sources):
    (sources / "bad.cu").write_text("__global__ void bad(int* x) { x = 1; }\n")
    with pytest.raises(CompileError, match=r"bad\.cu\(1\): error"):
        compile_all([Kernel("scale.cu", "other"), Kernel("bad.cu", "bad")], ARCH)


# ---- signature ----------------------------------------------------------------------------------------------------

SIGNATURES = """
// __global__ void commented(int a);
/* template <typename T> __global__ void also(T a); */
#define MACRO(x) __global__ void macro(int x) \\
    { }
template <typename T, int N = 4, typename U = float>
__global__ void __launch_bounds__(N <= 2 ? 1024 : (512), 2) many(
    const T* __restrict__ x, U* y,  // the output
    const int64_t count, unsigned int flags, bool on, const void* any) {}
extern "C" __global__ void plain(int, float* p);
__device__ int helper(int a, double b);
template <class T> __cluster_dims__(2, 1, 1) __global__ void odd(T** x, int* y) {}
template <typename T> __global__ void custom(MyType* x) {}
__global__ void nothing() {}
"""


def test_signatures():
    f32, bf16, u32 = map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.uint32))
    rest = (
        Parameter("count", False, np.dtype(np.int64)),
        Parameter("flags", False, u32),
        Parameter("on", False, np.dtype(np.bool_)),
        Parameter("any", True, None),
    )
    many = parse_signature(SIGNATURES, "many<__nv_bfloat16>")
    assert many == (Parameter("x", True, bf16), Parameter("y", True, f32), *rest)
    many = parse_signature(SIGNATURES, "many<fp16, 8, uint8_t>")
    assert many[:2] == (Parameter("x", True, np.dtype(np.float16)), Parameter("y", True, np.dtype(np.uint8)))
    assert parse_signature(SIGNATURES, "nothing") == ()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("commented", "no kernel 'commented'; the file has: custom, many, nothing, odd, plain"),
        ("macro", "no kernel 'macro'"),
        ("helper", "no kernel 'helper'"),
        ("plain", "cannot read the parameter 'int'"),
        ("odd<int>", "cannot read the parameter 'T\\*\\* x'"),
        ("custom<int>", "the type of 'MyType\\* x' is not one of float, double"),
        ("many<MyType>", "the type of 'const T\\* __restrict__ x' is not one of"),
    ],
)
def test_signatures_that_cannot_be_checked(name, message):
    with pytest.raises(ValueError, match=message):
        parse_signature(SIGNATURES, name)


# ---- arguments ------------------------------------------------------------------------------------------------------

PARAMETERS = parse_signature("__global__ void f(const bf16* x, int n, float eps, uint64_t seed, void* any) {}", "f")


def array(dtype=ml_dtypes.bfloat16, device=0, address=0x1000, shape=(2, 3)):
    """A CuPy array over an invented address: no GPU is needed to have one, only to touch it."""
    memory = cupy.cuda.UnownedMemory(address, 4096, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


def test_arguments_are_packed_as_the_driver_reads_them():
    arguments = Arguments("f (f.cu)", PARAMETERS, device=0)
    values = arguments.check([array(), np.int32(-7), np.float32(0.5), np.uint64(2**63), None])
    arguments.pack(values)
    slots = [arguments.buffer.raw[i : i + 8] for i in range(0, 40, 8)]
    assert int.from_bytes(slots[0], "little") == 0x1000
    assert np.frombuffer(slots[1], np.int32)[0] == -7
    assert np.frombuffer(slots[2], np.float32)[0] == 0.5
    assert np.frombuffer(slots[3], np.uint64)[0] == 2**63
    assert slots[4] == bytes(8)
    assert arguments.check([None, np.int32(1), np.float32(1), np.uint64(1), array(np.uint8)])[4] == 0x1000


def test_tensor_maps_are_passed_from_where_they_lie():
    parameters = parse_signature("__global__ void f(int n, const __grid_constant__ TensorMap m) {}", "f")
    assert parameters[1] == Parameter("m", False, None)
    arguments = Arguments("f (f.cu)", parameters, device=0)
    tensor_map = object.__new__(TensorMap)  # making one takes a driver
    tensor_map.address = 0x2000
    arguments.pack(arguments.check([np.int32(5), tensor_map]))
    assert arguments.handles[1] == 0x2000
    assert np.frombuffer(arguments.buffer.raw, np.int32)[0] == 5
    with pytest.raises(ValueError, match=r"argument 1 \(m\) is None; needed is a TensorMap"):
        arguments.check([np.int32(5), None])


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (
            0,
            array(np.float16),
            r"argument 0 \(x\) is cupy float16\[2, 3\] .*needed is a C-contiguous bfloat16 cupy array",
        ),
        (0, array().T, "bfloat16.3, 2. not contiguous"),
        (0, array(device=1), "on device 1; needed is .* on device 0"),
        (0, np.zeros((2, 3), ml_dtypes.bfloat16), "is numpy bfloat16"),
        (0, 4096, r"is int\(4096\)"),
        (1, 3, r"argument 1 \(n\) is int\(3\); needed is np.int32\(...\)"),
        (1, np.int64(3), r"is int64\(3\); needed is np.int32"),
        (1, None, "is None; needed is np.int32"),
        (2, 1e-6, r"argument 2 \(eps\) is float\(1e-06\); needed is np.float32"),
        (2, np.float64(1), "needed is np.float32"),
        (3, np.int64(1), "needed is np.uint64"),
        (4, np.zeros(1), r"argument 4 \(any\) is numpy float64\[1\]; needed is a C-contiguous cupy array"),
    ],
)
def test_wrong_arguments_are_refused_by_name(index, value, message):
    args = [array(), np.int32(1), np.float32(1), np.uint64(1), None]
    args[index] = value
    with pytest.raises(ValueError, match=message) as error:
        Arguments("f (f.cu)", PARAMETERS, device=0).check(args)
    assert str(error.value).startswith("f (f.cu): ")


def test_argument_count_is_checked():
    with pytest.raises(ValueError, match=r"f \(f.cu\) takes 5 arguments, 4 were given"):
        Arguments("f (f.cu)", PARAMETERS, device=0).check([None] * 4)


def test_scalars_that_numpy_cannot_pass_are_refused():
    with pytest.raises(ValueError, match="scalar x is float16"):
        Arguments("f (f.cu)", (Parameter("x", False, np.dtype(np.float16)),), device=0)


def test_type_names():
    assert [kernel.type_name(dtype) for dtype in kernel.DTYPES] == ["float", "fp16", "bf16"]
    with pytest.raises(ValueError, match="not float64"):
        kernel.type_name(np.float64)


# ---- require_cuda ---------------------------------------------------------------------------------------------


class FakeRuntime(types.SimpleNamespace):
    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, built_for=13020, count=1, capability=(9, 0)):
        super().__init__(built_for=built_for, count=count, capability=capability)

    def runtimeGetVersion(self):
        return self.built_for

    def getDeviceCount(self):
        if self.count is None:
            raise self.CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")
        return self.count

    def getDevice(self):
        return 0

    def getDeviceProperties(self, index):
        major, minor = self.capability
        return {"name": b"NVIDIA Test", "major": major, "minor": minor}


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU, as far as require_cuda can see; tests take something away."""

    def set_up(driver=13000, **runtime):
        monkeypatch.setattr(cuda, "driver_cuda_version", lambda: driver)
        monkeypatch.setattr(cupy.cuda, "runtime", FakeRuntime(**runtime))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return set_up


def refusal() -> str:
    with pytest.raises(cuda.CudaUnavailable) as error:
        cuda.require_cuda()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_require_cuda_is_content_with_a_gpu(machine):
    machine()
    cuda.require_cuda()


def test_require_cuda_without_driver(machine):
    machine(driver=None)
    assert "no NVIDIA driver" in refusal()


@pytest.mark.parametrize(("driver", "extra"), [(12080, "cuda12"), (13000, "cuda13")])
def test_require_cuda_without_cupy(machine, monkeypatch, driver, extra):
    machine(driver=driver)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    assert f'pip install "mini-vllm[{extra}]"' in refusal()


def test_require_cuda_with_an_old_driver(machine):
    machine(driver=12040, built_for=13020)
    message = refusal()
    assert "driver serves CUDA 12.4 but the installed CuPy is for CUDA 13" in message
    assert 'pip install "mini-vllm[cuda12]"' in message


def test_require_cuda_without_gpu(machine, monkeypatch):
    machine(count=None)
    assert "finds no GPU (cudaErrorNoDevice" in refusal()
    machine(count=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "finds no GPU; CUDA_VISIBLE_DEVICES is ''" in refusal()


def test_require_cuda_with_an_old_gpu(machine):
    machine(capability=(7, 5))
    assert "NVIDIA Test has compute capability 7.5; the kernels need 8.0 or higher" in refusal()


def test_require_cuda_with_a_gpu_newer_than_nvrtc(machine):
    machine(capability=(99, 0))
    assert "does not know compute capability 99.0 of this GPU: upgrade it" in refusal()


def test_require_cuda_without_nvrtc_or_headers(machine, monkeypatch):
    from cuda import pathfinder
    from cupy_backends.cuda.libs import nvrtc

    machine()
    for cached in (compiler.nvrtc_version, compiler.header_directory):
        cached.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "getVersion", lambda: (_ for _ in ()).throw(RuntimeError("libnvrtc was not found")))
        assert "NVRTC, CUDA's run-time compiler, is not installed; install them with: pip install" in refusal()
    with monkeypatch.context() as patch:
        patch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: None)
        assert "CUDA's headers (cuda_fp16.h) are not installed; install them with: pip install" in refusal()


def test_importing_the_package_imports_no_cupy():
    script = "import sys, mini_vllm.ops.cuda; sys.exit('cupy' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
