"""The recorded test run on a GPU is one of the sources that are here."""

import json


def test_the_recorded_run_is_of_these_sources_and_passed(root, digest):
    record = json.loads((root / "tests" / "gpu_record.json").read_text(encoding="utf-8"))
    assert record["source_digest"] == digest, (
        "cuda_src or mini_vllm/ops differ from what was last tested on a GPU: "
        "python -m pytest -m gpu --gpu-record tests/gpu_record.json"
    )
    assert record["failed"] == 0, record["failures"]
    assert record["passed"] > 3000
