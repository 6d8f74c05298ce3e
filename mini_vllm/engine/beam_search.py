"""Beam search over the engine's forks: the W most likely continuations of a prompt, W sequences at a time.

A beam is a sequence of the scheduler. After each step the engine hands over the best next tokens of every beam; the W
best continuations overall go on. The first of them that continues a beam takes that beam's sequence over, every
further one is a fork of it: it shares the full blocks and copies the last one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from mini_vllm.engine.model_runner import StepResult
from mini_vllm.engine.outputs import BeamSearchOutput, BeamSearchSequence
from mini_vllm.sampling_params import BeamSearchParams, SamplingParams
from mini_vllm.scheduling.scheduler import Scheduler, SchedulerOutput
from mini_vllm.scheduling.sequence import FinishReason, Sequence

MAX_CANDIDATES = 256  # top tokens that a backend returns


class _CandidateParams(SamplingParams):
    max_logprobs = MAX_CANDIDATES


@dataclass
class _Beam:
    """A sequence whose tokens are all chosen; `candidates` are (log probability, token) of the next one, best first."""

    seq: Sequence
    logprob: float
    candidates: list[tuple[float, int]] | None = None


@dataclass
class _Search:
    """The search of one prompt: beams that go on, and hypotheses that ended, at most `beam_width` of each."""

    prompt: list[int]
    beams: list[_Beam]
    hypotheses: list[BeamSearchSequence] = field(default_factory=list)
    is_done: bool = False


class BeamSearch:
    """Searches for all prompts at once, in the batch of an engine that has nothing else to do.

    The definition is transformers' (`num_beams`, `early_stopping=False`): scores are log probabilities divided by
    the number of new tokens, EOS included, to the power of length_penalty; only continuations among the best
    `beam_width` of a step may end; a search is done when its best beam, were it to end now, could not enter the
    hypotheses any more.

    Args:
        run: launches a plan and waits for it.
        new_seq_id: a fresh, larger id at each call.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        run: Callable[[SchedulerOutput], StepResult],
        new_seq_id: Callable[[], int],
        params: BeamSearchParams,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._scheduler, self._run, self._new_seq_id = scheduler, run, new_seq_id
        self._params = params
        self._eos = frozenset() if params.ignore_eos else eos_token_ids
        # As many as could all be EOS, and beam_width more.
        self._num_candidates = max(2, 1 + len(self._eos)) * params.beam_width
        if self._num_candidates > MAX_CANDIDATES:
            raise ValueError(
                f"beam_width={params.beam_width} needs the {self._num_candidates} best tokens of a step, the backend "
                f"returns at most {MAX_CANDIDATES}; use a smaller beam_width"
            )
        self._seq_params = _CandidateParams(
            temperature=0, max_tokens=None, ignore_eos=True, logprobs=self._num_candidates, detokenize=False
        )

    def search(self, prompts: list[list[int]]) -> list[BeamSearchOutput]:
        """The best continuations of each prompt, best first. Prompts are token ids that fit the model."""
        searches = [_Search(prompt, []) for prompt in prompts]
        for search in searches:
            search.beams.append(self._start(search.prompt, len(search.prompt), 0.0, None))
        self._beam_of = {beam.seq.seq_id: beam for search in searches for beam in search.beams}
        try:
            while not all(search.is_done for search in searches):
                self._step()
                for search in searches:
                    if not search.is_done and all(beam.candidates is not None for beam in search.beams):
                        self._choose(search)
        finally:
            for beam in self._beam_of.values():
                self._scheduler.finish(beam.seq, FinishReason.ABORT)
        return [BeamSearchOutput(search.hypotheses) for search in searches]

    def _start(self, token_ids: list[int], num_prompt_tokens: int, logprob: float, fork_of: Sequence | None) -> _Beam:
        max_num_tokens = num_prompt_tokens + self._params.max_tokens + 1  # never reached: the search ends before
        seq = Sequence(self._new_seq_id(), token_ids, self._seq_params, max_num_tokens=max_num_tokens, fork_of=fork_of)
        self._scheduler.add(seq)
        return _Beam(seq, logprob)

    def _step(self) -> None:
        """Run a step; beams that reached their last token get their candidates and wait for the others."""
        plan = self._scheduler.schedule()
        if not plan.scheduled:
            self._make_room()
            return
        result = self._run(plan)
        for row, seq in enumerate(self._scheduler.update(plan, result.token_ids)):
            # The drawn token is not the search's choice. Without it nothing of the sequence is left to compute.
            seq.token_ids.pop()
            scores = result.logprobs
            pairs = zip(scores.top_logprobs[row].tolist(), scores.top_ids[row].tolist(), strict=True)
            self._beam_of[seq.seq_id].candidates = list(itertools.islice(pairs, self._num_candidates))

    def _make_room(self) -> None:
        """Beams that wait for others hold all the blocks or seats: take theirs, they start again when they go on."""
        waiting = [beam.seq for beam in self._beam_of.values() if beam.candidates is not None]
        assert any(not seq.is_finished for seq in waiting), "no beam can run, although none waits for another"
        for seq in waiting:
            self._scheduler.finish(seq, FinishReason.ABORT)

    def _choose(self, search: _Search) -> None:
        """All beams have candidates: end the best continuations that end, go on with the best that do not."""
        width, num_new = self._params.beam_width, search.beams[0].seq.num_tokens - len(search.prompt) + 1
        divisor = num_new**self._params.length_penalty
        totals = [(beam.logprob + logprob, i, token) for i, beam in enumerate(search.beams)
                  for logprob, token in beam.candidates]  # fmt: skip
        best = sorted(totals, key=lambda total: -total[0])[: self._num_candidates]
        is_last = num_new == self._params.max_tokens
        for total, i, token in best[:width]:
            if is_last or token in self._eos:
                tokens = [*search.beams[i].seq.token_ids, token]
                reason = "stop" if token in self._eos else "length"
                score = total / divisor
                search.hypotheses.append(BeamSearchSequence(tokens, total, score, finish_reason=reason))
        search.hypotheses = sorted(search.hypotheses, key=lambda h: -h.score)[:width]
        going_on = [entry for entry in best if entry[2] not in self._eos][:width]
        could_improve = bool(going_on) and (
            len(search.hypotheses) < width or going_on[0][0] / divisor > search.hypotheses[-1].score
        )
        search.is_done = is_last or not could_improve
        self._go_on(search, [] if search.is_done else going_on)

    def _go_on(self, search: _Search, chosen: list[tuple[float, int, int]]) -> None:
        """Replace the beams by the chosen (log probability, beam, token)."""
        parents, search.beams = search.beams, []
        tokens = [parent.seq.token_ids.copy() for parent in parents]
        taken: set[int] = set()
        for total, i, token in chosen:
            source = parents[i].seq
            if i in taken or source.is_finished:
                beam = self._start([*tokens[i], token], len(search.prompt), total, source)
            else:
                taken.add(i)
                source.token_ids.append(token)
                beam = replace(parents[i], logprob=total, candidates=None)
            search.beams.append(beam)
        for i, parent in enumerate(parents):
            if i not in taken:
                self._scheduler.finish(parent.seq, FinishReason.ABORT)
                del self._beam_of[parent.seq.seq_id]
        self._beam_of |= {beam.seq.seq_id: beam for beam in search.beams}
