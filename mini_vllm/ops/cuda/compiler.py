"""From a .cu file to machine code: flatten its includes, ask NVRTC, read the compiler's report. Needs no GPU.

CuPy's RawModule is not used because its cache overlooks changed headers, it never asks for the `a` variants
of an architecture (wgmma, TMA), it forces -ftz=true and it cannot compile without a GPU.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

import mini_vllm
from mini_vllm.ops.cuda import CudaUnavailable, install_hint

_ENTRY_FORMAT = 1  # raise when Cubin or its serialisation changes: older cache entries are then not found

# How C++ spells the element types that a kernel's parameters may have; the aliases are those of common.cuh.
_DTYPES = {
    "float": np.float32,
    "double": np.float64,
    **dict.fromkeys(("fp16", "half", "__half"), np.float16),
    **dict.fromkeys(("bf16", "__nv_bfloat16"), ml_dtypes.bfloat16),
    "bool": np.bool_,
    **dict.fromkeys(("int8_t", "signed char"), np.int8),
    **dict.fromkeys(("uint8_t", "unsigned char"), np.uint8),
    **dict.fromkeys(("int16_t", "short"), np.int16),
    **dict.fromkeys(("uint16_t", "unsigned short"), np.uint16),
    **dict.fromkeys(("int32_t", "int"), np.int32),
    **dict.fromkeys(("uint32_t", "unsigned", "unsigned int"), np.uint32),
    **dict.fromkeys(("int64_t", "long long"), np.int64),
    **dict.fromkeys(("uint64_t", "unsigned long long"), np.uint64),
}


class CompileError(RuntimeError):
    """A kernel that the compiler refused; the message holds file, line and the compiler's text."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a `__global__` function.

    dtype is None for `void*`, which takes any array, and for a TensorMap (wgmma.cuh), which is no pointer.
    """

    name: str
    is_pointer: bool
    dtype: np.dtype | None


@dataclass(frozen=True)
class Resources:
    """What one thread or block of a kernel occupies, as ptxas reports it."""

    registers: int  # a thread
    shared_bytes: int  # a block, static; dynamic shared memory comes on top
    stack_bytes: int  # a thread, in local memory
    spill_bytes: int  # a thread: stores and loads of registers that did not fit


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel for one architecture, and what is needed to launch it."""

    image: bytes
    lowered_name: str  # the mangled name in the image
    parameters: tuple[Parameter, ...]
    resources: Resources | None  # None: the compiler did not report them
    warnings: str  # what the compiler remarked; empty for a clean kernel

    def to_bytes(self) -> bytes:
        header = asdict(self)
        del header["image"]
        for parameter in header["parameters"]:
            parameter["dtype"] = parameter["dtype"] and parameter["dtype"].name
        return json.dumps(header).encode() + b"\n" + self.image

    @staticmethod
    def from_bytes(data: bytes) -> Cubin:
        line, _, image = data.partition(b"\n")
        header = json.loads(line)
        parameters = []
        for parameter in header.pop("parameters"):
            dtype = parameter.pop("dtype")
            parameters.append(Parameter(**parameter, dtype=np.dtype(dtype) if dtype else None))
        resources = header.pop("resources")
        return Cubin(
            image=image,
            parameters=tuple(parameters),
            resources=resources and Resources(**resources),
            **header,
        )


# ---- source -------------------------------------------------------------------------------------------------


def source_directory() -> Path:
    """Where the .cu files are: `$MINI_VLLM_CUDA_SRC`, else inside the installed package or beside it in a checkout.

    Raises:
        ValueError: MINI_VLLM_CUDA_SRC is not a directory.
    """
    override = os.environ.get("MINI_VLLM_CUDA_SRC")
    if override:
        if not Path(override).is_dir():
            raise ValueError(f"MINI_VLLM_CUDA_SRC={override}: no such directory; unset it or name a copy of cuda_src")
        return Path(override)
    package = Path(mini_vllm.__file__).parent
    installed = package / "cuda_src"
    return installed if installed.is_dir() else package.parent / "cuda_src"


_INCLUDE = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


def flatten(file: str) -> str:
    """The text of a .cu file with every `#include "..."` replaced by that file, once, between #line marks.

    One text means one hash for the cache, and the marks keep file and line in the compiler's messages.
    Includes are looked up beside the including file, then in include/; they belong at the top of a file,
    outside any #if. `#include <...>` is left to the compiler.

    Raises:
        ValueError: the file, or one that it includes, does not exist.
    """
    root = source_directory()
    seen: set[Path] = set()

    def expand(path: Path) -> Iterator[str]:
        seen.add(path)
        name = os.path.relpath(path, root)
        yield f'#line 1 "{name}"'
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if match := _INCLUDE.match(line):
                choices = [path.parent / match[1], root / "include" / match[1]]
                included = next((choice for choice in choices if choice.is_file()), None)
                if included is None:
                    looked = " and ".join(str(choice.parent) for choice in choices)
                    raise ValueError(f'{name}({number}): #include "{match[1]}": no such file in {looked}')
                if included.resolve() not in seen:
                    yield from expand(included.resolve())
                yield f'#line {number + 1} "{name}"'
            elif _PRAGMA_ONCE.match(line):
                yield ""  # each file comes once anyway, and NVRTC warns of the pragma in a main file
            else:
                yield line

    root = root.resolve()
    path = root / file
    if not path.is_file():
        known = ", ".join(sorted(p.name for p in root.glob("*.cu"))) or "none"
        raise ValueError(f"no kernel file {file!r} in {root}; there are: {known}")
    return "\n".join(expand(path)) + "\n"


# ---- signature ------------------------------------------------------------------------------------------------

_COMMENT_OR_DIRECTIVE = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.DOTALL | re.MULTILINE)
_ATTRIBUTE = re.compile(r"\b__(?:launch_bounds|cluster_dims|maxnreg)__\s*\([^()]*(?:\([^()]*\)[^()]*)*\)")
_KERNEL = re.compile(r"\b__global__\b[^(;{]*?(\w+)\s*\(")


def _split(text: str) -> list[str]:
    """Split at the commas that are outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "<([") - (char in ">)]")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def parse_signature(source: str, name: str) -> tuple[Parameter, ...]:
    """The parameters of a kernel, read from its source text.

    Args:
        source: C++ text, as `flatten` returns it.
        name: a name expression such as "rms_norm<bf16>"; its arguments replace the template's type parameters.

    Raises:
        ValueError: there is no such kernel, or a parameter's type is not one that a launch can check.
    """
    base, _, template_arguments = name.partition("<")
    text = _ATTRIBUTE.sub(" ", _COMMENT_OR_DIRECTIVE.sub(" ", source))
    kernels = {match[1]: match for match in _KERNEL.finditer(text)}
    match = kernels.get(base.strip())
    if match is None:
        raise ValueError(f"no kernel {base!r}; the file has: {', '.join(sorted(kernels)) or 'none'}")

    end, depth = match.end(), 1
    while depth:
        depth += (text[end] == "(") - (text[end] == ")")
        end += 1
    types = _template_types(text[: match.start()], _split(template_arguments.rpartition(">")[0]))

    parameters = []
    for declaration in _split(text[match.end() : end - 1]):
        words = re.sub(r"\b(const|volatile|__restrict__|__grid_constant__)\b", " ", declaration)
        spelled = re.fullmatch(r"\s*(\w[\w\s]*?)(?:\s*(\*)\s*|\s+)(\w+)\s*", words)
        if spelled is None:
            raise ValueError(f"kernel {base!r}: cannot read the parameter {declaration!r}")
        ctype = " ".join(spelled[1].split())
        ctype, is_pointer = types.get(ctype, ctype), bool(spelled[2])
        if ctype not in _DTYPES and (ctype, is_pointer) not in (("void", True), ("TensorMap", False)):
            known = ", ".join(_DTYPES)
            raise ValueError(f"kernel {base!r}: the type of {declaration!r} is not one of {known}, void*, TensorMap")
        dtype = np.dtype(_DTYPES[ctype]) if ctype in _DTYPES else None
        parameters.append(Parameter(spelled[3], is_pointer, dtype))
    return tuple(parameters)


def _template_types(before: str, arguments: list[str]) -> dict[str, str]:
    """What each type parameter stands for, if the text just before a kernel is its `template <...>`."""
    declaration = re.search(r"\btemplate\s*<([^;{}]*)>\s*$", before)
    types = {}
    for i, parameter in enumerate(_split(declaration[1]) if declaration else []):
        left, _, default = parameter.partition("=")
        if match := re.fullmatch(r"(?:typename|class)\s+(\w+)\s*", left):
            types[match[1]] = arguments[i] if i < len(arguments) else default.strip()
    return types


# ---- NVRTC ----------------------------------------------------------------------------------------------------


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the NVRTC library. Raises CudaUnavailable where it is not installed."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        return nvrtc.getVersion()
    except (ImportError, RuntimeError, OSError) as error:  # RuntimeError: the library's loader did not find it
        raise CudaUnavailable(f"NVRTC, CUDA's run-time compiler, is not installed; {install_hint()}") from error


def library_path(name: str) -> str:
    """The file that serves as "nvrtc" or "cublasLt" here. Raises CudaUnavailable where there is none."""
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        return load_nvidia_dynamic_lib(name).abs_path
    except (DynamicLibNotFoundError, OSError) as error:
        raise CudaUnavailable(f"the library {name} is not installed; {install_hint()}") from error


@functools.cache
def header_directory() -> str:
    """The directory of cuda_fp16.h. Raises CudaUnavailable where CUDA's headers are not installed."""
    from cuda.pathfinder import find_nvidia_header_directory

    directory = find_nvidia_header_directory("cudart")
    if directory is None or not os.path.isfile(os.path.join(directory, "cuda_fp16.h")):
        raise CudaUnavailable(f"CUDA's headers (cuda_fp16.h) are not installed; {install_hint()}")
    return directory


@functools.cache
def _header_digest() -> str:
    """A hash of the CUDA headers that kernels use: an upgrade of their package must not serve old code."""
    digest = hashlib.sha256()
    for path in sorted(Path(header_directory()).glob("cuda_[bf][fp]*.h*")):  # cuda_bf16, cuda_fp16, cuda_fp8
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _flags(arch: str, options: tuple[str, ...]) -> tuple[str, ...]:
    # -lineinfo costs no speed and lets profilers and compute-sanitizer name source lines.
    flags = (f"-arch={arch}", "-std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v", *options)
    # From 12.9 on, NVRTC takes machine code from the driver's own cache, and then reports no resources.
    return (*flags, "-no-cache") if nvrtc_version() >= (12, 9) else flags


def cache_key(source: str, name: str, options: tuple[str, ...], arch: str) -> str:
    """A hash of everything that the machine code depends on."""
    parts = [_ENTRY_FORMAT, source, name, _flags(arch, options), nvrtc_version(), _header_digest()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def compile_cubin(source: str, file: str, name: str, options: tuple[str, ...], arch: str) -> Cubin:
    """Compile one kernel instance.

    Args:
        source: flattened text; file: its name in messages; name: an NVRTC name expression such as
        "rms_norm<bf16>"; options: further compiler flags; arch: "sm_80", "sm_90a", ...

    Raises:
        CompileError: the compiler's messages.
        ValueError: the kernel is not in the source, or its parameters cannot be checked.
    """
    from cupy_backends.cuda.libs import nvrtc

    try:
        parameters = parse_signature(source, name)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    program = nvrtc.createProgram(source, file, (), ())
    try:
        nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (*_flags(arch, options), f"-I{header_directory()}"))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).strip() or str(error)
            raise CompileError(f"cannot compile {name} for {arch} from {source_directory() / file}\n{log}") from None
        lowered_name = nvrtc.getLoweredName(program, name)
        log = nvrtc.getProgramLog(program)
        image = nvrtc.getCUBIN(program) + b"\0"  # CuPy's binding cuts the last byte off
    finally:
        nvrtc.destroyProgram(program)
    return Cubin(image, lowered_name, parameters, *_read_log(log, lowered_name))


def _read_log(log: str, lowered_name: str) -> tuple[Resources | None, str]:
    """The resources of one kernel out of ptxas's report, and the rest of the log: warnings."""
    warnings = [line for line in log.splitlines() if line.strip("\0 ") and not line.startswith("ptxas ")]
    _, found, report = log.partition(f"Compiling entry function '{lowered_name}'")
    used = re.search(r"Used (\d+) registers[^\n]*", report)  # the first is this kernel's, others may follow
    if not found or not used:
        return None, "\n".join(warnings)

    def number(pattern: str, text: str) -> int:
        match = re.search(pattern, text)
        return int(match[1]) if match else 0

    resources = Resources(
        registers=int(used[1]),
        shared_bytes=number(r"(\d+) bytes smem", used[0]),
        stack_bytes=number(r"(\d+) bytes stack frame", report),
        spill_bytes=number(r"(\d+) bytes spill stores", report) + number(r"(\d+) bytes spill loads", report),
    )
    return resources, "\n".join(warnings)
