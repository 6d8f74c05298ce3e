"""From safetensors files to the model: names, shapes, merged projections.

The library validates each file (header size, offsets, overlaps, truncation); the tensors are then views of
the memory-mapped file, so a weight is read once, while it is converted and merged.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from mini_vllm.config import ModelConfig, read_json
from mini_vllm.models.decoder import MLP, Attention, CausalLM, DecoderLayer
from mini_vllm.models.rope import rope_table
from mini_vllm.ops.base import Array, Ops
from mini_vllm.ops.weight import DenseWeight, RepeatedBlock

INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
# Tables that old checkpoints store although they follow from config.json.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


class TensorSource(Protocol):
    """Where weights come from: a checkpoint, or a random generator."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray | RepeatedBlock: ...


class Checkpoint:
    """The tensors of a model directory by name, as views of memory-mapped safetensors files.

    Raises `ValueError` naming file and tensor for missing, truncated or malformed files, and for index
    entries that point outside the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tensors: dict[str, tuple[Path, np.ndarray]] = {}
        self._unused: set[str] = set()
        for path in self._files():
            self._open(path)
        self._unused.update(self._tensors)

    def _files(self) -> list[Path]:
        index = self.directory / INDEX_FILE
        if not index.exists():
            single = self.directory / "model.safetensors"
            files = [single] if single.exists() else sorted(self.directory.glob("*.safetensors"))
            if not files:
                raise ValueError(f"{self.directory} holds no *.safetensors file (.bin checkpoints are not supported)")
            return files
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map must map tensor names to files")
        for tensor, name in weight_map.items():
            # A hub snapshot's files are links into the cache, so the name is checked, not where it leads.
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(f"{index}: {tensor} is in {name!r}, which is not a safetensors file of the directory")
        return [self.directory / name for name in sorted(set(weight_map.values()))]

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy"):  # validates the whole header against the file's size
                pass
            with open(path, "rb") as file:
                header_size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_size), object_pairs_hook=_unique_keys)
            data = np.memmap(path, np.uint8, mode="r", offset=8 + header_size) if header_size else None
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist, but the checkpoint's index names it") from None
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                raise ValueError(
                    f"{path}: tensor {name} has dtype {entry['dtype']}; supported are {', '.join(_DTYPES)}"
                )
            if name in self._tensors:
                raise ValueError(f"{path}: tensor {name} is also in {self._tensors[name][0].name}")
            start, end = entry["data_offsets"]
            view = data[start:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            self._tensors[name] = (path, view)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """A view of one tensor, which must have this shape."""
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: tensor {name} {list(shape)} is missing from the checkpoint")
        path, view = self._tensors[name]
        if view.shape != shape:
            raise ValueError(f"{path}: tensor {name} has shape {list(view.shape)}, config.json asks for {list(shape)}")
        self._unused.discard(name)
        return view

    def check_tied(self, name: str, other: str) -> None:
        """Refuse a tied pair whose two tensors are both stored but differ: one of them would be ignored."""
        if name in self._tensors:
            path, view = self._tensors[name]
            # As bits: faster than comparing bfloat16, and a NaN equals itself.
            if not np.array_equal(view.view(np.uint16), self.tensor(other, view.shape).view(np.uint16)):
                raise ValueError(
                    f"{path}: {name} differs from {other}, but config.json says tie_word_embeddings; set it to false "
                    "if the checkpoint's head is its own"
                )
            self._unused.discard(name)

    def check_all_used(self) -> None:
        """Refuse tensors the model has no place for: the config is then not the checkpoint's."""
        extra = sorted(n for n in self._unused if not n.endswith(_DERIVED))
        if extra:
            shown = ", ".join(extra[:5]) + (f" and {len(extra) - 5} more" if len(extra) > 5 else "")
            raise ValueError(
                f"{self._tensors[extra[0]][0]}: config.json describes a model without the tensor(s) {shown}"
            )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of equal keys, which the safetensors format forbids, the parser would keep the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"its header names {max(counts, key=counts.get)} more than once")
    return value


class DummyWeights:
    """Seeded random weights of the right shapes (load_format="dummy"): speed without a download.

    One block of normal numbers is repeated from an offset that depends on the tensor's name, since drawing
    billions of them would take minutes. Its length is prime, so no two rows of a matrix are equal.
    """

    def __init__(self, seed: int) -> None:
        self._block = np.random.default_rng(seed).standard_normal(1_048_573, np.float32) * np.float32(0.02)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray | RepeatedBlock:
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32)
        return RepeatedBlock(self._block, zlib.crc32(name.encode()) % len(self._block), shape)


def load_decoder(config: ModelConfig, source: TensorSource, ops: Ops, max_model_len: int) -> CausalLM:
    """Build the model from HF's tensor names, merging q, k, v and gate, up, in the dtype of `ops`.

    The embedding serves as lm_head where config.json ties them; an lm_head.weight may then only repeat it.
    """
    hidden, head_dim = config.hidden_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim

    def load(name: str, *shape: int) -> Array:
        return ops.load_weight([source.tensor(name, shape)])

    def projection(prefix: str, parts: dict[str, int], columns: int, bias: bool = False) -> DenseWeight:
        """One projection made of the checkpoint's blocks of rows, `parts` {name: rows}."""

        def stack(suffix: str, *row_shape: int) -> Array:
            tensors = {f"{prefix}.{name}.{suffix}": (rows, *row_shape) for name, rows in parts.items()}
            return ops.load_weight([source.tensor(name, shape) for name, shape in tensors.items()])

        return DenseWeight(stack("weight", columns), stack("bias") if bias else None)

    def layer(i: int) -> DecoderLayer:
        prefix = f"model.layers.{i}"
        attn, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        gate_up = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        return DecoderLayer(
            input_norm=load(f"{prefix}.input_layernorm.weight", hidden),
            attention=Attention(
                qkv_proj=projection(attn, qkv, hidden, config.qkv_bias),
                o_proj=projection(attn, {"o_proj": hidden}, q_size, config.o_bias),
                q_norm=load(f"{attn}.q_norm.weight", head_dim) if config.qk_norm else None,
                k_norm=load(f"{attn}.k_norm.weight", head_dim) if config.qk_norm else None,
                window=config.sliding_windows[i],
            ),
            post_attention_norm=load(f"{prefix}.post_attention_layernorm.weight", hidden),
            mlp=MLP(
                gate_up_proj=projection(mlp, gate_up, hidden),
                down_proj=projection(mlp, {"down_proj": hidden}, config.intermediate_size),
            ),
        )

    embed_tokens = load("model.embed_tokens.weight", config.vocab_size, hidden)
    layers = tqdm(
        range(config.num_hidden_layers), "Loading weights", unit="layer", delay=1
    )  # small models load silently
    tied = config.tie_word_embeddings
    model = CausalLM(
        config=config,
        ops=ops,
        embed_tokens=embed_tokens,
        layers=tuple(layer(i) for i in layers),
        norm=load("model.norm.weight", hidden),
        lm_head=DenseWeight(embed_tokens if tied else load("lm_head.weight", config.vocab_size, hidden)),
        rope=ops.to_device(rope_table(config.rope, head_dim, max_model_len)),
    )
    if isinstance(source, Checkpoint):
        if tied:
            source.check_tied("lm_head.weight", "model.embed_tokens.weight")
        source.check_all_used()
    return model
