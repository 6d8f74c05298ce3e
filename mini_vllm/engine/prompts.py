"""The forms in which prompts and chat messages are accepted, checked at the door."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

FORMS = 'a string, a list of token ids, {"prompt": string} or {"prompt_token_ids": [...]}, perhaps with "cache_salt"'


@dataclass(frozen=True)
class Prompt:
    """Text, token ids, or both once the text is encoded; and what its cached prefixes are kept apart by."""

    text: str | None
    token_ids: list[int] | None
    cache_salt: str | None = None


def parse_prompt(prompt: Any) -> Prompt:
    """One prompt in any accepted form; `ValueError` names what came and what is accepted."""
    if isinstance(prompt, str):
        return Prompt(prompt, None)
    if isinstance(prompt, Mapping):
        if "cache_salt" in prompt:
            salt = prompt["cache_salt"]
            if salt is not None and (not isinstance(salt, str) or not salt):
                raise ValueError(f"cache_salt must be a string that is not empty, got {salt!r}")
            prompt = {key: value for key, value in prompt.items() if key != "cache_salt"}
            return replace(parse_prompt(prompt), cache_salt=salt)
        if set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
            return Prompt(prompt["prompt"], None)
        if {"prompt_token_ids"} <= set(prompt) <= {"prompt_token_ids", "prompt"}:
            return Prompt(prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"]))
        raise ValueError(f"a prompt must be {FORMS}; got a mapping with the keys {sorted(map(str, prompt))}")
    if isinstance(prompt, (list, tuple)):
        return Prompt(None, _token_ids(prompt))
    raise ValueError(f"a prompt must be {FORMS}; got {type(prompt).__name__}")


def parse_prompts(prompts: Any) -> tuple[list[Prompt], bool]:
    """(prompts, whether a single one came): a list of integers is one prompt of token ids, as in vLLM."""
    is_list = isinstance(prompts, (list, tuple)) and not (prompts and _is_token_id(prompts[0]))
    if not is_list:
        return [parse_prompt(prompts)], True
    parsed = []
    for i, prompt in enumerate(prompts):
        try:
            parsed.append(parse_prompt(prompt))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from None
    return parsed, False


def _is_token_id(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _token_ids(values: Any) -> list[int]:
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"prompt_token_ids must be a list of integers, got {type(values).__name__}")
    if set(map(type, values)) <= {int}:  # nearly always; one by one, a million would take half a second
        return list(values)
    for value in values:
        if not _is_token_id(value):
            raise ValueError(f"prompt token ids must be integers, got {value!r}")
    return [operator.index(value) for value in values]
