import dataclasses
import math
import re

import pytest

from mini_vllm.sampling_params import MAX_SEQUENCES_PER_REQUEST, SamplingParams

NAN, INF = math.nan, math.inf
HUGE = 10**400  # too large for a float; a JSON body may hold it


def refused(text: str, **values) -> object:
    """One row of the table below: these values raise ValueError with this text in the message."""
    shown = {name: repr(value)[:20] for name, value in values.items()}
    return pytest.param(values, text, id=",".join(f"{name}={value}" for name, value in shown.items()))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        refused("temperature must be a finite number in [0, 2], got nan", temperature=NAN),
        refused("temperature must be a finite number in [0, 2], got inf", temperature=INF),
        refused("temperature must be a finite number in [0, 2], got '1'", temperature="1"),
        refused("temperature must be a finite number in [0, 2], got None", temperature=None),
        refused("temperature must be a finite number in [0, 2], got True", temperature=True),
        refused("temperature must be a finite number in [0, 2], got 1000", temperature=HUGE),
        refused("temperature must be in [0, 2], got -1", temperature=-1),
        refused("temperature must be in [0, 2], got 2.01", temperature=2.01),
        refused("top_p must be in (0, 1], got 0", top_p=0),
        refused("top_p must be in (0, 1], got -1", top_p=-1),
        refused("top_p must be in (0, 1], got 1.01", top_p=1.01),
        refused("top_p must be a finite number in (0, 1], got nan", top_p=NAN),
        refused("min_p must be in [0, 1], got 2", min_p=2),
        refused("min_p must be in [0, 1], got -0.1", min_p=-0.1),
        refused("presence_penalty must be in [-2, 2], got 2.1", presence_penalty=2.1),
        refused("presence_penalty must be in [-2, 2], got -2.1", presence_penalty=-2.1),
        refused("frequency_penalty must be in [-2, 2], got 2.1", frequency_penalty=2.1),
        refused("frequency_penalty must be in [-2, 2], got -2.1", frequency_penalty=-2.1),
        refused("repetition_penalty must be in (0, inf), got 0", repetition_penalty=0),
        refused("repetition_penalty must be in (0, inf), got -1", repetition_penalty=-1),
        refused("repetition_penalty must be a finite number in (0, inf), got inf", repetition_penalty=INF),
        refused("repetition_penalty must be a finite number in (0, inf), got 1000", repetition_penalty=HUGE),
        refused("top_k must be an integer >= -1, got -2", top_k=-2),
        refused("top_k must be an integer >= -1, got 1.5", top_k=1.5),
        refused("top_k must be an integer >= -1, got None", top_k=None),
        refused("n must be an integer in [1, 16384], got 0", n=0),
        refused("n must be an integer in [1, 16384], got -1", n=-1),
        refused("n must be an integer in [1, 16384], got 1000000000", n=10**9),
        refused("n=2 with temperature=0 would return 2 equal texts; use n=1", n=2, temperature=0),
        refused("seed must be an integer in [-1, 9223372036854775807] or None, got 92", seed=2**63),
        refused("seed must be an integer in [-1, 9223372036854775807] or None, got -2", seed=-2),
        refused("seed must be an integer in [-1, 9223372036854775807] or None, got 'x'", seed="x"),
        refused("max_tokens must be an integer >= 1 or None, got 0", max_tokens=0),
        refused("max_tokens must be an integer >= 1 or None, got -1", max_tokens=-1),
        refused("max_tokens must be an integer >= 1 or None, got True", max_tokens=True),
        refused("max_tokens must be an integer >= 1 or None, got 16.0", max_tokens=16.0),
        refused("min_tokens must be an integer >= 0, got -1", min_tokens=-1),
        refused("min_tokens=9 is larger than max_tokens=8", min_tokens=9, max_tokens=8),
        refused("min_tokens=17 is larger than max_tokens=16", min_tokens=17),  # the default max_tokens
        refused("logprobs must be an integer in [0, 20] or None, got 1000000", logprobs=10**6),
        refused("logprobs must be an integer in [0, 20] or None, got -2", logprobs=-2),
        refused("logprobs must be an integer in [0, 20] or None, got True", logprobs=True),
        refused("prompt_logprobs must be an integer in [0, 20] or None, got 21", prompt_logprobs=21),
        refused("prompt_logprobs must be an integer in [0, 20] or None, got -1", prompt_logprobs=-1),
        refused("stop holds an empty string, which every text contains; remove it", stop=""),
        refused("stop holds an empty string, which every text contains; remove it", stop=["\n", ""]),
        refused("stop must be a string or a list of strings, got ['a', 1]", stop=["a", 1]),
        refused("stop must be a string or a list of strings, got 7", stop=7),
        refused("stop strings need the text: use detokenize=True", stop="\n", detokenize=False),
        refused("bad_words holds an empty string", bad_words=[""]),
        refused("bad_words must be a string or a list of strings, got {'a': 1}", bad_words={"a": 1}),
        refused("stop_token_ids must be a list of token ids, got 2", stop_token_ids=2),
        refused("stop_token_ids must hold token ids >= 0, got -1", stop_token_ids=[2, -1]),
        refused("stop_token_ids must hold token ids >= 0, got '2'", stop_token_ids=["2"]),
        refused("stop_token_ids must hold token ids >= 0, got True", stop_token_ids=[True]),
        refused("allowed_token_ids is empty: no token could be sampled; use None", allowed_token_ids=[]),
        refused("allowed_token_ids must hold token ids >= 0, got 1.0", allowed_token_ids=[1.0]),
        refused("logit_bias must map token ids to numbers, got [5]", logit_bias=[5]),
        refused("logit_bias must hold token ids >= 0, got 'x'", logit_bias={"x": 1}),
        refused("logit_bias must hold token ids >= 0, got '-1'", logit_bias={"-1": 1}),
        refused("logit_bias must hold token ids >= 0, got -1", logit_bias={-1: 1}),
        refused("logit_bias[5] must be a number in [-100, 100], got nan", logit_bias={5: NAN}),
        refused("logit_bias[5] must be a number in [-100, 100], got inf", logit_bias={5: INF}),
        refused("logit_bias[5] must be a number in [-100, 100], got -inf", logit_bias={5: -INF}),
        refused("logit_bias[5] must be a number in [-100, 100], got 100.5", logit_bias={5: 100.5}),
        refused("logit_bias[5] must be a number in [-100, 100], got '1'", logit_bias={5: "1"}),
        refused("logit_bias[5] must be a number in [-100, 100], got True", logit_bias={5: True}),
        refused("include_stop_str_in_output must be True or False, got 1", include_stop_str_in_output=1),
        refused("ignore_eos must be True or False, got None", ignore_eos=None),
        refused("skip_special_tokens must be True or False, got 'no'", skip_special_tokens="no"),
        refused("detokenize must be True or False, got 0", detokenize=0),
    ],
)
def test_bad_values_are_refused_by_name_value_and_range(values, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (0, 0.01, 1, 2, 2.0)),
        *(("top_p", value) for value in (1e-9, 1, 1.0)),
        *(("min_p", value) for value in (0, 1)),
        *(("presence_penalty", value) for value in (-2, 2)),
        *(("frequency_penalty", value) for value in (-2, 2)),
        *(("repetition_penalty", value) for value in (0.01, 1, 100)),
        *(("top_k", value) for value in (0, 1, 2**40)),  # above the vocabulary's size it is off
        *(("n", value) for value in (1, MAX_SEQUENCES_PER_REQUEST)),
        *(("seed", value) for value in (None, 0, 2**63 - 1)),
        *(("max_tokens", value) for value in (None, 1, 2**31, 2**63)),  # the context length is the limit
        *(("min_tokens", value) for value in (0, 16)),
        *(("logprobs", value) for value in (None, 0, 20)),
        *(("prompt_logprobs", value) for value in (None, 0, 20)),
        ("logit_bias", {0: -100, 999_999_999: 100}),  # only the engine knows the vocabulary
        ("logit_bias", dict.fromkeys(range(10**5), 0.5)),
    ],
)
def test_the_edges_of_each_range_are_accepted_and_kept(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("temperature", 1e-9, 0.01),  # a softmax at 1e-9 would overflow
        ("top_k", -1, 0),
        ("seed", -1, None),
        ("stop", "\n", ("\n",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", None, ()),
        ("stop", ["x" * 10**6], ("x" * 10**6,)),
        ("stop", [str(i) for i in range(10**4)], tuple(str(i) for i in range(10**4))),
        ("bad_words", "darn", ("darn",)),
        ("bad_words", None, ()),
        ("stop_token_ids", [7, 5], (7, 5)),
        ("stop_token_ids", None, ()),
        ("allowed_token_ids", [3, 3], (3, 3)),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_other_spellings_are_brought_into_one_form(name, given, stored):
    assert getattr(SamplingParams(**{name: given}), name) == stored


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.max_tokens, params.min_tokens) == (1, 1.0, 16, 0)
    assert (params.top_k, params.top_p, params.min_p) == (0, 1.0, 0.0)
    assert (params.seed, params.logprobs, params.prompt_logprobs) == (None, None, None)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ((), (), ())
    assert (params.logit_bias, params.allowed_token_ids) == (None, None)
    assert (params.ignore_eos, params.include_stop_str_in_output) == (False, False)
    assert (params.skip_special_tokens, params.detokenize) == (True, True)


def test_min_tokens_is_free_without_max_tokens():
    assert SamplingParams(min_tokens=1000, max_tokens=None).min_tokens == 1000


def test_temperature_zero_is_greedy_and_the_smallest_positive_one_is_not():
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=1e-9, n=2).is_greedy


def test_each_penalty_is_noticed_and_neutral_values_are_not():
    assert not SamplingParams(repetition_penalty=1, presence_penalty=0, frequency_penalty=0).has_penalties
    assert SamplingParams(repetition_penalty=1.1).has_penalties
    assert SamplingParams(presence_penalty=-0.5).has_penalties
    assert SamplingParams(frequency_penalty=0.5).has_penalties


def test_params_cannot_change_under_a_request():
    stop, bias, ids = ["a"], {5: 1.0}, [7]
    params = SamplingParams(stop=stop, logit_bias=bias, stop_token_ids=ids, allowed_token_ids=ids)
    stop.append("b")
    bias[6] = 2.0
    ids.append(8)
    assert (params.stop, params.logit_bias) == (("a",), {5: 1.0})
    assert (params.stop_token_ids, params.allowed_token_ids) == ((7,), (7,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5


def test_replace_makes_a_checked_copy():
    params = SamplingParams(seed=-1, top_k=-1, stop="\n", logit_bias={5: 1})
    assert dataclasses.replace(params) == params
    with pytest.raises(ValueError, match="top_p must be in"):
        dataclasses.replace(params, top_p=0)


def test_unknown_names_are_refused():
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)
    with pytest.raises(ValueError, match="unknown sampling parameter best_of, temprature; known are n, tem"):
        SamplingParams.from_dict({"temprature": 0.5, "n": 1, "best_of": 2})


def test_from_dict_checks_like_the_constructor():
    values = {"temperature": 0.7, "max_tokens": 100, "stop": ["\n"]}
    assert SamplingParams.from_dict(values) == SamplingParams(**values)
    with pytest.raises(ValueError, match="temperature must be in"):
        SamplingParams.from_dict({"temperature": -1})
