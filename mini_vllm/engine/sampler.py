"""From the sampling parameters of a batch to the columns that `Ops.sample` reads; rules that need history live here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from mini_vllm.engine.batch_state import BatchState
from mini_vllm.ops.base import BANNED, SamplingBatch
from mini_vllm.scheduling.scheduler import ScheduledSequence
from mini_vllm.scheduling.sequence import Sequence


def build_sampling_batch(sampling: list[ScheduledSequence], state: BatchState) -> SamplingBatch:
    """The rules for the next token of each scheduled sequence that samples, as host arrays."""
    seats = np.array([s[0].seat for s in sampling], np.intp)
    columns = {name: column[seats] for name, column in state.sampling.items()}
    columns["positions"] = np.array([s[1] + s[2] for s in sampling], np.int32)
    if state.has_rules[seats].any():
        columns |= _build_rules([s.seq for s in sampling], columns["positions"].tolist())
    random = columns["temperature"] > 0
    filtered = (columns["top_k"] > 0) | (columns["top_p"] < 1) | (columns["min_p"] > 0)
    return SamplingBatch(**columns, any_random=bool(random.any()), any_filter=bool((random & filtered).any()))


def _build_rules(seqs: list[Sequence], positions: list[int]) -> dict[str, np.ndarray]:
    """The ragged columns, and those of penalties: what depends on a sequence's tokens, or few sequences have."""
    params = [seq.sampling_params for seq in seqs]
    columns: dict[str, np.ndarray] = {}
    if any(p.has_penalties for p in params):
        counts = [_token_counts(seq) if seq.sampling_params.has_penalties else {} for seq in seqs]
        columns["penalty_offsets"], columns["penalty_ids"], columns["penalty_counts"] = _csr(counts, np.int32)
        # Legal, but too large or too small for a float32 to be meaningful.
        columns["repetition_penalty"] = np.clip([p.repetition_penalty for p in params], 1e-6, 1e6).astype(np.float32)
        columns["presence_penalty"] = np.array([p.presence_penalty for p in params], np.float32)
        columns["frequency_penalty"] = np.array([p.frequency_penalty for p in params], np.float32)
    biases = [_biases(seq, position) for seq, position in zip(seqs, positions, strict=True)]
    if any(biases):
        columns["bias_offsets"], columns["bias_ids"], columns["bias_values"] = _csr(biases, np.float32)
    if any(p.allowed_token_ids for p in params):
        allowed = [dict.fromkeys(p.allowed_token_ids or (), 0) for p in params]
        columns["allowed_offsets"], columns["allowed_ids"], _ = _csr(allowed, np.int32)
    return columns


def _token_counts(seq: Sequence) -> dict[int, int]:
    """How often each token of the sequence occurs in the output; 0 for those only in the prompt."""
    return {**dict.fromkeys(seq.token_ids[: seq.num_prompt_tokens], 0), **Counter(seq.output_token_ids)}


def _biases(seq: Sequence, position: int) -> dict[int, float]:
    """logit_bias, and a ban on what bad_words and min_tokens forbid for the token at this position."""
    params = seq.sampling_params
    biases = dict(params.logit_bias or {})
    for word in seq.bad_words_token_ids:
        prefix = list(word[:-1])
        if not prefix or seq.output_token_ids[-len(prefix) :] == prefix:
            biases[word[-1]] = BANNED
    if position - seq.num_prompt_tokens < params.min_tokens:
        biases.update(dict.fromkeys(seq.stop_token_ids, BANNED))
    return biases


def _csr(rows: Iterable[Mapping[int, float]], dtype: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(offsets, token ids, values) of one {token id: value} a row."""
    rows = list(rows)
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    ids = np.array([token_id for row in rows for token_id in row], np.int32)
    values = np.array([value for row in rows for value in row.values()], dtype)
    return offsets, ids, values
