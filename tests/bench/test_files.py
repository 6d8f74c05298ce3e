"""JSON files of benchmarks: written, read, and refused by name."""

import pytest

from mini_vllm.bench.files import read_json, write_json


def test_what_is_written_is_read(tmp_path):
    path, value = tmp_path / "file.json", {"name": "größe", "samples": [1, 2.5, None]}
    write_json(value, path)
    assert read_json(path) == value
    assert path.read_text(encoding="utf-8").endswith("}\n")


@pytest.mark.parametrize("content", [b"", b"[", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(tmp_path, content):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json cannot be read as JSON"):
        read_json(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.json cannot be read as JSON"):
        read_json(tmp_path / "none.json")
