"""`LLM`: offline inference in vLLM's shape, a thin front of `LLMEngine`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mini_vllm.engine.llm_engine import LLMEngine
from mini_vllm.engine.outputs import BeamSearchOutput, RequestOutput
from mini_vllm.sampling_params import BeamSearchParams, SamplingParams
from mini_vllm.tokenizer import Tokenizer


class LLM:
    """A model ready to generate. Arguments are those of `EngineConfig`; no model means the bundled demo.

    llm = LLM("Qwen/Qwen3-0.6B")
    for output in llm.generate(["Hello", "Once upon a time"], SamplingParams(max_tokens=64)):
        print(output.outputs[0].text)
    """

    def __init__(self, model: str | Path | None = None, **kwargs: Any) -> None:
        self.llm_engine = LLMEngine(model, **kwargs)

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts: str, token ids, {"prompt_token_ids": [...]}, or a list of any of these.

        sampling_params: one for all prompts or one for each; None takes the checkpoint's defaults. Returns
        one output a prompt, in order. Raises `ValueError` before anything runs if a prompt is refused.
        """
        outputs = self.llm_engine.generate(prompts, sampling_params, use_tqdm)
        return outputs if isinstance(outputs, list) else [outputs]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of them, through the checkpoint's chat template."""
        many = bool(messages) and not isinstance(messages[0], Mapping)
        prompts = [
            self.llm_engine.encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template_kwargs=chat_template_kwargs,
            )
            for conversation in (messages if many else [messages])
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def stream(self, prompt: Any, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the completion of one prompt piece by piece; closing the iterator aborts the request."""
        return self.llm_engine.stream(prompt, sampling_params)

    def beam_search(self, prompts: Any, params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The most likely continuations of prompts in any form that `generate` takes; one output a prompt, in order."""
        return self.llm_engine.beam_search(prompts, params)

    def reset_prefix_cache(self) -> None:
        """Forget the K/V of all earlier prompts and outputs."""
        self.llm_engine.reset_prefix_cache()

    def get_tokenizer(self) -> Tokenizer | None:
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        return self.llm_engine.get_default_sampling_params()
