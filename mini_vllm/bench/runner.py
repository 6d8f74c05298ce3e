"""Runs a workload through an engine and notes what each request saw.

Two ways: `generate` hands all requests over at once and takes the times that the engine notes itself, as an offline
user would; `stream` lets them arrive over time and watches every token come out, as a server would.
"""

from __future__ import annotations

import gc
import itertools
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
from tqdm import tqdm

from mini_vllm.bench.workloads import Workload
from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.engine.outputs import EngineStats
from mini_vllm.sampling_params import SamplingParams
from mini_vllm.tracing import NULL_TRACER, NullTracer, Tracer

Result = TypeVar("Result")


@dataclass(frozen=True)
class RequestTiming:
    """What one request saw, in seconds.

    ttft: from its arrival to its first token; e2e: to its last one.
    itls: the gaps between its tokens; empty if nobody watched them.
    """

    num_output_tokens: int
    ttft: float
    e2e: float
    itls: tuple[float, ...] = ()

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None if there was one only."""
        return (self.e2e - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None


@dataclass(frozen=True)
class Run:
    """A workload that was run to its end.

    elapsed: seconds from the first request to the last token.
    peak_concurrency: requests in the engine at once.
    peak_output_throughput: most tokens in a second of the run; None if nobody watched.
    """

    elapsed: float
    requests: list[RequestTiming]
    peak_concurrency: int
    peak_output_throughput: float | None = None

    @property
    def num_output_tokens(self) -> int:
        return sum(request.num_output_tokens for request in self.requests)


def with_engine(arguments: dict[str, Any], measure: Callable[[LLMEngine], Result]) -> Result:
    """`measure` of a new engine, whose memory is free again afterwards. `arguments` are `EngineConfig`'s."""
    engine = LLMEngine(**arguments)
    on_gpu = engine.runner.ops.device == "cuda"
    gc.freeze()  # as `LLMEngine` advises
    try:
        return measure(engine)
    finally:
        del engine
        gc.unfreeze()
        if on_gpu:
            free_gpu_memory()


def free_gpu_memory() -> None:
    """Give back what nobody refers to any more, graphs and pools included."""
    from mini_vllm.ops.cuda.device import free_cached_memory

    gc.collect()
    free_cached_memory()


def generate(engine: LLMEngine, workload: Workload, params: list[SamplingParams], use_tqdm: bool = False) -> Run:
    """One `LLMEngine.generate` over the whole workload."""
    start = time.perf_counter()
    outputs = engine.generate(workload.prompts, params, use_tqdm)
    elapsed = time.perf_counter() - start
    requests = []
    for output, asked in zip(outputs, workload.output_lens, strict=True):
        num_tokens = len(output.outputs[0].token_ids)
        check_complete(output.request_id, num_tokens, asked)
        m = output.metrics
        requests.append(
            RequestTiming(num_tokens, m.first_token_time - m.arrival_time, m.finished_time - m.arrival_time)
        )
    return Run(elapsed, requests, peak_concurrency=len(requests))


def stream(
    engine: LLMEngine,
    workload: Workload,
    params: list[SamplingParams],
    arrivals: Sequence[float] | None = None,
    max_concurrency: int | None = None,
    progress: bool = False,
) -> Run:
    """Requests join the running engine when they arrive, and every token is noted as it comes out.

    arrivals: seconds from the start, ascending; None is all at once. They do not wait for the engine (open loop):
        a request's clock starts when it arrives, even if a step is still running then.
    max_concurrency: no more requests in the engine than this; a request's clock then starts when there is room.
    """
    num_requests = len(workload)
    arrivals = [0.0] * num_requests if arrivals is None else arrivals
    limit = max_concurrency or num_requests
    tracer = engine.tracer
    begun: dict[str, float] = {}  # request id: when its clock started
    token_times: dict[str, list[float]] = {}
    num_tokens: dict[str, int] = {}
    tokens_of_second: dict[int, int] = {}
    next_request = peak = 0
    room_since = 0.0  # when a request last left a full engine
    start = time.perf_counter()
    with tqdm(total=num_requests, desc="Requests", unit="req", disable=None if progress else True) as bar:
        while next_request < num_requests or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            running = engine.num_unfinished_requests()
            while next_request < num_requests and arrivals[next_request] <= now and running < limit:
                request_id = str(next_request)
                begun[request_id] = max(arrivals[next_request], room_since)
                token_times[request_id], num_tokens[request_id] = [], 0
                engine.add_request(request_id, workload.prompts[next_request], params[next_request])
                next_request += 1
                running += 1
            peak = max(peak, running)
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, arrivals[next_request] - now))
                continue
            with tracer.span("step", num_requests=running):
                outputs = engine.step()
            if tracer is not NULL_TRACER:
                count_state(engine, tracer)
            now = time.perf_counter() - start
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                new = count - num_tokens[output.request_id]
                if new:
                    num_tokens[output.request_id] = count
                    token_times[output.request_id].append(now)
                    tokens_of_second[int(now)] = tokens_of_second.get(int(now), 0) + new
                if output.finished:
                    bar.update()
                    if running >= limit:
                        room_since = now
    elapsed = time.perf_counter() - start
    requests = []
    for request_id, times in token_times.items():
        check_complete(request_id, num_tokens[request_id], workload.output_lens[int(request_id)])
        first, last = times[0], times[-1]
        gaps = tuple(b - a for a, b in itertools.pairwise(times))
        begin = begun[request_id]
        requests.append(RequestTiming(num_tokens[request_id], first - begin, last - begin, gaps))
    # The last second is not a whole one, unless the run is shorter than that.
    whole = [count for second, count in tokens_of_second.items() if second + 1 <= elapsed]
    busiest = max(whole) if whole else sum(tokens_of_second.values()) / elapsed
    return Run(elapsed, requests, peak, float(busiest))


def check_complete(request_id: str, num_tokens: int, asked: int) -> None:
    """Raise `RuntimeError` if a request ended early: the figures would be of another workload."""
    if num_tokens != asked:
        raise RuntimeError(f"request {request_id} ended after {num_tokens} of {asked} output tokens")


def trace(
    engine: LLMEngine,
    workload: Workload,
    params: list[SamplingParams],
    arrivals: Sequence[float] | None = None,
    max_concurrency: int | None = None,
) -> Tracer:
    """One more run of the workload, with spans; on a GPU they are NVTX ranges too."""
    if engine.runner.ops.device == "cuda":
        from mini_vllm.ops.cuda.device import nvtx_pop, nvtx_push

        tracer = Tracer(nvtx_push, nvtx_pop)
    else:
        tracer = Tracer()
    engine.tracer = tracer
    try:
        stream(engine, workload, params, arrivals, max_concurrency)
    finally:
        engine.tracer = NULL_TRACER
    return tracer


def count_state(engine: LLMEngine, tracer: Tracer | NullTracer) -> None:
    """Note the engine's queues and cache in a trace."""
    stats = engine.stats()
    tracer.counter("requests", running=stats.num_running, waiting=stats.num_waiting)
    tracer.counter("kv_blocks", in_use=stats.num_kv_blocks - stats.num_free_kv_blocks)


# ---- what a step must read --------------------------------------------------------------------------------


def decode_step_bytes(engine: LLMEngine, batch_size: int, context: float) -> float:
    """Bytes that a decode step must read at least: each weight once, and the K/V that its sequences see.

    batch_size: sequences; context: tokens of each of them.
    """
    model, kv = engine.runner.model, engine.runner.kv
    num_bytes = float(array_bytes((model.layers, model.norm, model.lm_head)))
    for layer, keys, values in zip(model.layers, kv.keys, kv.values, strict=True):
        per_token = (keys.nbytes + values.nbytes) / (kv.num_blocks * kv.block_size)
        num_bytes += batch_size * per_token * min(context, layer.attention.window or context)
    return num_bytes


def array_bytes(value: Any) -> int:
    """Bytes of all arrays in a tree of dataclasses, lists and tuples."""
    if is_dataclass(value):
        return sum(array_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, (list, tuple)):
        return sum(map(array_bytes, value))
    return getattr(value, "nbytes", 0)


def measured_roofs() -> tuple[float, float]:
    """This GPU's (bytes a second of reading, bfloat16 matrix FLOP a second). Needs 2 GiB of its memory."""
    from mini_vllm.bench.kernels import measure_roofs
    from mini_vllm.ops.cuda.cuda_ops import CudaOps

    roofs = measure_roofs(CudaOps(ml_dtypes.bfloat16))
    free_gpu_memory()
    return roofs


# ---- what a run took --------------------------------------------------------------------------------------


def engine_state(engine: LLMEngine, before: EngineStats) -> dict[str, Any]:
    """The engine's configuration, memory and cache after a run, for the report; counters from `before` on."""
    runner, after = engine.runner, engine.stats()
    counters = ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions")
    return {
        "model": Path(engine.config.model).name if engine.config.model else "demo model",
        "device": runner.ops.device,
        "dtype": str(runner.ops.dtype),
        "max_model_len": engine.max_model_len,
        "config": asdict(engine.config),
        "kv": {
            "block_size": engine.config.block_size,
            "num_kv_blocks": after.num_kv_blocks,
            "peak_kv_blocks": after.peak_kv_blocks,
            **{name: getattr(after, name) - getattr(before, name) for name in counters},
        },
        "peak_memory": peak_memory(runner.ops.device),
    }


def peak_memory(device: str) -> dict[str, Any]:
    """Bytes, and of what. CuPy's pools keep what they once needed, so that on a GPU the present is the peak."""
    if device == "cuda":
        from mini_vllm.ops.cuda.device import memory_info

        free, total = memory_info()
        return {"bytes": total - free, "of": "GPU memory in use, other processes included"}
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "of": "resident memory of this process"}
