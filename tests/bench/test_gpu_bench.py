"""What only a GPU can tell: the roofs, the share of them, and that the suite's check holds."""

import json
import shutil
import time

import pytest

from mini_vllm.bench.gpu_monitor import gpu_monitor
from mini_vllm.bench.latency import latency_lines, measure_latency
from mini_vllm.bench.presets import preset_arguments
from mini_vllm.bench.runner import measured_roofs
from mini_vllm.bench.startup import PARTS, start_once
from mini_vllm.bench.suite import check_tokens
from mini_vllm.bench.throughput import Load, measure_throughput
from mini_vllm.bench.workloads import random_workload

pytestmark = pytest.mark.gpu


def test_the_gpu_s_tokens_are_those_of_the_specification():
    assert check_tokens("cuda") == (
        "cuda",
        "greedy tokens of 5 prompts in float32 are those of the NumPy backend",
    )


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="needs nvidia-smi")
def test_clock_and_power_are_those_of_this_gpu():
    with gpu_monitor("cuda") as found:
        time.sleep(3)
    assert found["readings"] > 1
    assert 100 < found["sm_clock_mhz"] <= found["max_sm_clock_mhz"] < 10_000
    assert 5 < found["power_w"] < 2 * found["power_limit_w"]


def test_roofs_are_those_of_a_gpu():
    bandwidth, flops = measured_roofs()
    assert 100e9 < bandwidth < 20e12
    assert 10e12 < flops < 5e15


def test_latency_of_a_preset_reaches_for_the_bandwidth_and_leaves_no_memory_behind():
    import cupy

    from mini_vllm.ops.cuda.device import free_cached_memory

    def run():
        with preset_arguments("qwen3-0.6b") as arguments:
            return measure_latency(
                {**arguments, "device": "cuda", "max_model_len": 1024, "max_num_seqs": 8},
                batch_size=1,
                num_iters=3,
                num_iters_warmup=1,
                temperature=0.0,
                traced=True,
            )

    run()
    free_cached_memory()
    held = cupy.get_default_memory_pool().total_bytes()  # of this process: other tests may be using the GPU, too
    report, tracer = run()
    free_cached_memory()
    assert cupy.get_default_memory_pool().total_bytes() <= held
    assert 0.05 < report.metrics["share_of_bandwidth_limit"].median < 1.1
    assert report.engine["peak_memory"]["bytes"] > report.details["decode_step_bytes"] > 1e9
    assert any(line.startswith("Bandwidth limit: ") for line in latency_lines(report))
    assert {"step", "schedule", "prepare", "launch", "wait"} <= {span.name for span in tracer.spans}
    environment = json.loads(json.dumps(report.to_dict()))["environment"]
    assert {"gpu", "nvrtc", "cupy", "driver_cuda"} <= set(environment)


def test_throughput_over_time():
    load = Load(request_rate=100.0, max_concurrency=4)
    arguments = {"device": "cuda", "max_model_len": 256, "max_num_seqs": 8, "kv_cache_memory": 64 << 20}
    report, run, _ = measure_throughput(
        arguments, lambda engine: random_workload(12, 40, 20, engine.model_config.vocab_size), load
    )
    assert run.num_output_tokens == 240
    assert run.peak_concurrency <= 4
    assert len(report.metrics["itl_ms"].samples) == 12 * 19


def test_a_cold_start_compiles_and_a_warm_one_does_not():
    arguments = {"device": "cuda", "max_model_len": 256, "max_num_seqs": 8}
    _, cold = start_once(arguments, cold=True)
    start_once(arguments, cold=False)
    device, warm = start_once(arguments, cold=False)
    assert device == "cuda"
    assert set(PARTS) <= set(cold)
    assert cold["kernels"] > 2 * warm["kernels"]


def test_kernels_are_timed():
    from mini_vllm.bench.kernels import REPLAYS, measure_kernels

    found = measure_kernels("bfloat16", only="1 x 256, 16/8 heads").to_dict()
    name = "rope_attention decode 1 x 256, 16/8 heads"
    assert list(found["metrics"]) == list(found["cases"]) == [name]
    assert len(found["metrics"][name]["samples"]) == REPLAYS
    assert 0 < found["cases"][name]["share_of_roof"] < 1.1
    assert {"gpu", "nvrtc", "cupy", "driver_cuda"} <= set(found["environment"])
