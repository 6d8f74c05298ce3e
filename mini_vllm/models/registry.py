"""Which function loads which architecture of config.json."""

from __future__ import annotations

from mini_vllm.models.weights import load_decoder

LOADERS = {
    "LlamaForCausalLM": load_decoder,
    "MistralForCausalLM": load_decoder,
    "Qwen2ForCausalLM": load_decoder,
    "Qwen3ForCausalLM": load_decoder,
}
