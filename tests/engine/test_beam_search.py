"""Beam search beyond what the oracle fixes: bad input, what is left behind, and the text."""

import pytest

from mini_vllm import LLM, BeamSearchParams, SamplingParams


@pytest.fixture
def engine(demo_llm):
    engine = demo_llm.llm_engine
    yield engine
    engine.check()
    assert engine.scheduler.num_available_blocks == engine.scheduler.block_manager.num_blocks


def test_one_beam_is_greedy_decoding(demo_llm, engine):
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    greedy = demo_llm.generate("The king", params, use_tqdm=False)[0]
    (output,) = demo_llm.beam_search("The king", BeamSearchParams(beam_width=1, max_tokens=20, ignore_eos=True))
    (best,) = output.sequences
    assert best.tokens == greedy.prompt_token_ids + greedy.outputs[0].token_ids
    assert best.text == greedy.outputs[0].text
    assert best.finish_reason == "length"


def test_one_token_each_is_the_list_of_the_most_likely_tokens(demo_llm, engine):
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    (expected,) = demo_llm.generate("The king", params, use_tqdm=False)[0].outputs[0].logprobs
    (output,) = demo_llm.beam_search("The king", BeamSearchParams(beam_width=20, max_tokens=1))
    ranked = sorted(expected.items(), key=lambda item: item[1].rank)
    assert [sequence.tokens[-1] for sequence in output.sequences] == [token for token, _ in ranked]
    for sequence, (_, entry) in zip(output.sequences, ranked, strict=True):
        assert sequence.score == sequence.cum_logprob == pytest.approx(entry.logprob, abs=1e-5)


def test_every_token_may_be_the_end(demo_llm, engine, monkeypatch):
    """All continuations end at once: nothing is left to go on with."""
    monkeypatch.setattr(engine, "eos_token_ids", frozenset(range(127)))
    (output,) = demo_llm.beam_search("The king", BeamSearchParams(beam_width=2, max_tokens=9))
    assert all(sequence.finish_reason in ("stop", "length") for sequence in output.sequences)
    assert len(output.sequences) == 2


def test_bad_input_is_refused_and_leaves_nothing_behind(demo_llm, engine):
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    with pytest.raises(ValueError, match="the prompt is empty"):
        demo_llm.beam_search({"prompt_token_ids": []}, params)
    with pytest.raises(ValueError, match="exceed max_model_len"):
        demo_llm.beam_search("The king", BeamSearchParams(beam_width=2, max_tokens=5000))
    with pytest.raises(ValueError, match="beam_width=257 exceeds max_num_seqs=256"):
        demo_llm.beam_search("The king", BeamSearchParams(beam_width=257, max_tokens=4))
    with pytest.raises(ValueError, match="the backend returns at most 256"):
        demo_llm.beam_search("The king", BeamSearchParams(beam_width=200, max_tokens=4))
    engine.add_request("a", "The king", SamplingParams(max_tokens=2))
    with pytest.raises(RuntimeError, match="needs the engine for itself"):
        demo_llm.beam_search("The king", params)
    engine.abort_request("a")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beam_width": 0}, "beam_width must be an integer >= 1, got 0"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer >= 1, got 1.5"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
    ],
)
def test_parameters_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 3, **values})


def test_more_beams_than_the_pool_holds_at_once():
    params = BeamSearchParams(beam_width=8, max_tokens=24, ignore_eos=True)
    expected = LLM(device="cpu").beam_search(["The king", "A wolf"], params)
    small = LLM(device="cpu", num_kv_blocks=8, block_size=4, max_model_len=32, max_num_seqs=8)
    actual = small.beam_search(["The king", "A wolf"], params)
    assert [[s.tokens for s in output.sequences] for output in actual] == [
        [s.tokens for s in output.sequences] for output in expected
    ]
    small.llm_engine.check()
