"""From the sampling parameters of a batch to the columns that `Ops.sample` reads; rules that need history live here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from mini_vllm.ops.base import BANNED, SamplingBatch
from mini_vllm.scheduling.sequence import Sequence


def build_sampling_batch(seqs: list[Sequence]) -> SamplingBatch:
    """The rules for the next token of each sequence, as host arrays."""
    params = [seq.sampling_params for seq in seqs]

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(p, name) for p in params], dtype)

    def clipped(name: str, dtype: type, low: float, high: float) -> np.ndarray:
        """A column of values that are legal but too large or too small for its dtype to be meaningful."""
        return np.array([min(max(getattr(p, name), low), high) for p in params], dtype)

    columns = {
        "temperature": column("temperature", np.float32),
        "top_k": clipped("top_k", np.int32, 0, 2**31 - 1),
        "top_p": column("top_p", np.float32),
        "min_p": column("min_p", np.float32),
        "seeds": np.array([seq.seed for seq in seqs], np.uint64),
        "positions": np.array([seq.num_tokens for seq in seqs], np.int32),
    }
    if any(p.has_penalties for p in params):
        counts = [_token_counts(seq) if seq.sampling_params.has_penalties else {} for seq in seqs]
        columns["penalty_offsets"], columns["penalty_ids"], columns["penalty_counts"] = _csr(counts, np.int32)
        columns["repetition_penalty"] = clipped("repetition_penalty", np.float32, 1e-6, 1e6)
        columns["presence_penalty"] = column("presence_penalty", np.float32)
        columns["frequency_penalty"] = column("frequency_penalty", np.float32)
    biases = [_biases(seq) for seq in seqs]
    if any(biases):
        columns["bias_offsets"], columns["bias_ids"], columns["bias_values"] = _csr(biases, np.float32)
    if any(p.allowed_token_ids for p in params):
        allowed = [dict.fromkeys(p.allowed_token_ids or (), 0) for p in params]
        columns["allowed_offsets"], columns["allowed_ids"], _ = _csr(allowed, np.int32)
    random = [p for p in params if not p.is_greedy]
    return SamplingBatch(
        **columns,
        any_random=bool(random),
        any_filter=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in random),
    )


def _token_counts(seq: Sequence) -> dict[int, int]:
    """How often each token of the sequence occurs in the output; 0 for those only in the prompt."""
    return {**dict.fromkeys(seq.token_ids[: seq.num_prompt_tokens], 0), **Counter(seq.output_token_ids)}


def _biases(seq: Sequence) -> dict[int, float]:
    """logit_bias, and a ban on what bad_words and min_tokens forbid now."""
    params = seq.sampling_params
    biases = dict(params.logit_bias or {})
    for word in seq.bad_words_token_ids:
        prefix = list(word[:-1])
        if not prefix or seq.output_token_ids[-len(prefix) :] == prefix:
            biases[word[-1]] = BANNED
    if seq.num_output_tokens < params.min_tokens:
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
