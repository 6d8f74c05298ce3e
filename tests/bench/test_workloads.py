"""What benchmarks ask for: the same on every machine, and nothing from a file that is not what it should be."""

import json
import random

import pytest

from mini_vllm.bench.workloads import (
    Workload,
    nano_workload,
    poisson_arrivals,
    prefix_repetition_workload,
    random_workload,
    read_sharegpt,
    sharegpt_workload,
)


class Words:
    """A tokenizer: one token a word."""

    def encode(self, text):
        return [len(word) for word in text.split()]


def test_nano_workload_is_nano_vllm_s_draw_by_draw():
    workload = nano_workload(vocab_size=151936)
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (142_827, 133_966)
    assert (len(workload), workload.max_len) == (256, 2011)
    assert workload.description["exact"]
    # The expressions of its bench.py, with the global generator that it uses.
    state = random.getstate()
    try:
        random.seed(0)
        prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
        output_lens = [random.randint(100, 1024) for _ in range(256)]
    finally:
        random.setstate(state)
    assert workload.prompts == prompts
    assert workload.output_lens == output_lens
    params = workload.sampling_params(0.6)
    assert {(p.temperature, p.ignore_eos) for p in params} == {(0.6, True)}
    assert [p.max_tokens for p in params] == output_lens


@pytest.mark.parametrize(
    "smaller", [{"num_prompts": 255}, {"max_input_len": 1023}, {"max_output_len": 50}, {"vocab_size": 10000}]
)
def test_a_smaller_nano_workload_says_so(smaller):
    workload = nano_workload(**{"vocab_size": 151936, **smaller})
    assert not workload.description["exact"]
    assert max(map(len, workload.prompts)) <= smaller.get("max_input_len", 1024)
    assert max(workload.output_lens) <= smaller.get("max_output_len", 1024)
    assert max(map(max, workload.prompts)) < smaller.get("vocab_size", 151936)
    assert workload.num_prompt_tokens > 0


def test_random_workload():
    workload = random_workload(20, 30, 10, vocab_size=500, seed=1)
    assert [len(prompt) for prompt in workload.prompts] == [30] * 20
    assert workload.output_lens == [10] * 20
    assert 0 <= min(map(min, workload.prompts)) < max(map(max, workload.prompts)) < 500
    assert workload.prompts == random_workload(20, 30, 10, vocab_size=500, seed=1).prompts
    assert workload.prompts != random_workload(20, 30, 10, vocab_size=500, seed=2).prompts
    assert max(map(max, random_workload(9, 900, 1, vocab_size=10**6).prompts)) < 10_000
    summary = workload.summary()
    assert (summary["num_prompts"], summary["num_prompt_tokens"], summary["num_output_tokens"]) == (20, 600, 200)


def test_random_lengths_and_a_common_prefix():
    workload = random_workload(300, 40, 10, vocab_size=500, range_ratio=0.5, prefix_len=7)
    lengths = {len(prompt) for prompt in workload.prompts}
    assert (min(lengths), max(lengths)) == (27, 67)
    assert (min(workload.output_lens), max(workload.output_lens)) == (5, 15)
    assert len({tuple(prompt[:7]) for prompt in workload.prompts}) == 1
    assert len({tuple(prompt[7:14]) for prompt in workload.prompts}) == 300
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1.0"):
        random_workload(1, 1, 1, vocab_size=10, range_ratio=1.0)


def test_prefix_repetition_workload():
    workload = prefix_repetition_workload(25, 500, prefix_len=8, suffix_len=4, num_prefixes=6, output_len=3)
    assert len(workload) == 24
    prefixes = [tuple(prompt[:8]) for prompt in workload.prompts]
    assert sorted(map(prefixes.count, set(prefixes))) == [4] * 6
    assert prefixes != sorted(prefixes, key=prefixes.index)  # shuffled, not group after group
    assert {len(prompt) for prompt in workload.prompts} == {12}
    with pytest.raises(ValueError, match="--num-prompts 5 must be at least"):
        prefix_repetition_workload(5, 500, num_prefixes=6)


def test_a_request_that_would_be_cut_is_refused():
    workload = Workload([[1] * 10, [1] * 4], [3, 9], {})
    workload.check_fits(13)
    with pytest.raises(ValueError, match="13 tokens, prompt and output, but max_model_len=12"):
        workload.check_fits(12)


# ---- ShareGPT ---------------------------------------------------------------------------------------------


def conversation(*texts):
    return {"id": "x", "conversations": [{"from": "human", "value": text} for text in texts]}


def words(count):
    return " ".join(["word"] * count)


def test_sharegpt_file_to_workload(tmp_path):
    path = tmp_path / "sharegpt.json"
    entries = [
        conversation(words(10), words(20), words(500)),
        conversation(words(50), words(60)),
        conversation(words(3), words(60)),  # too short a prompt
        conversation(words(60), words(2)),  # too short an answer
        conversation(words(1025), words(60)),  # too long a prompt
        conversation(words(100), words(250)),  # too long together, for a context of 300
        conversation(words(100)),  # no answer
    ]
    path.write_text(json.dumps(entries))
    pairs = read_sharegpt(path)
    assert len(pairs) == 6
    workload = sharegpt_workload(pairs, Words(), 2, max_len=300)
    assert sorted(zip(map(len, workload.prompts), workload.output_lens, strict=True)) == [(10, 20), (50, 60)]
    assert workload.prompts[0][0] == 4
    assert len(sharegpt_workload(pairs, Words(), 2, max_len=400)) == 2

    again = sharegpt_workload(pairs, Words(), 5, max_len=300)  # goes through the file again
    assert again.prompts[:2] == again.prompts[2:4] == workload.prompts
    assert again.description["num_conversations"] == 2

    fixed = sharegpt_workload(pairs, Words(), 10, max_len=300, output_len=7)
    assert set(fixed.output_lens) == {7}
    assert {len(prompt) for prompt in fixed.prompts} == {10, 50, 60, 100}  # their own answers do not matter
    with pytest.raises(ValueError, match="none of the 6 conversations"):
        sharegpt_workload(pairs, Words(), 2, max_len=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "got dict at the top"),
        ("[]", "holds no conversation"),
        ("[1]", "entry 0 is not a conversation"),
        ('[{"conversations": [{"value": "a"}, {"value": "b"}]}, {}]', "entry 1 is not a conversation"),
        ('[{"conversations": "text"}]', "entry 0 is not a conversation"),
        ('[{"conversations": [{"from": "human"}]}]', "entry 0 is not a conversation"),
        ('[{"conversations": [{"value": 1}, {"value": "b"}]}]', "entry 0 is not a conversation"),
        ('[{"conversations": [{"value": "alone"}]}]', "holds no conversation"),
    ],
)
def test_malformed_sharegpt_files_are_named(tmp_path, content, message):
    path = tmp_path / "sharegpt.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_sharegpt(path)
    assert str(path) in str(error.value)


def test_a_sharegpt_file_that_is_not_text(tmp_path):
    path = tmp_path / "sharegpt.json"
    path.write_bytes(b'["\xff"]')
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_sharegpt(path)


# ---- arrivals ---------------------------------------------------------------------------------------------


def test_poisson_arrivals():
    arrivals = poisson_arrivals(4000, rate=50.0, seed=3)
    assert arrivals[0] == 0
    assert arrivals == sorted(arrivals)
    assert arrivals == poisson_arrivals(4000, rate=50.0, seed=3) != poisson_arrivals(4000, rate=50.0, seed=4)
    # The sum of 3999 exponential gaps of mean and deviation 1/50: 80 seconds, give or take 5 times 1.26.
    assert abs(arrivals[-1] - 3999 / 50) < 5 * 3999**0.5 / 50
    assert poisson_arrivals(3, float("inf")) == [0.0, 0.0, 0.0]
