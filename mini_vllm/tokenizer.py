"""Text to token ids and back.

Encoding, and decoding of whole texts, is the `tokenizers` library reading the checkpoint's own tokenizer.json;
nothing of it is repeated here. What is ours guards a border: what a user writes stays text, so "<|im_end|>"
inside a message never becomes the control token.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_vllm.chat_template import (
    NAMED_SPECIAL_TOKENS,
    check_messages,
    check_template_kwargs,
    check_tools,
    cut_at_mark,
    map_strings,
    mark_final_message,
    render_template,
    short,
)

if TYPE_CHECKING:  # takes long to import and is needed late: `import mini_vllm` stays fast
    import tokenizers


class Tokenizer:
    """The tokenizer of a checkpoint. Safe to share between threads.

    tokenizer: the library's object. It is adopted: truncation and padding that tokenizer.json may prescribe
        are switched off, and the tokens named below are marked as special.
    bos_token, eos_token, unk_token, pad_token, additional_special_tokens: as in tokenizer_config.json. A name
        that the vocabulary lacks stays without an id.
    chat_template: jinja2 source, or a mapping of names to sources ("default", "tool_use").

    Raises `ValueError` for a decoder that does not simply join the texts of its tokens. Byte-level BPE (GPT-2,
    Qwen, Llama 3) and SentencePiece style (Metaspace, with or without byte fallback) both do.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
        additional_special_tokens: Iterable[str] = (),
        chat_template: str | Mapping[str, str] | None = None,
    ) -> None:
        named = dict(zip(NAMED_SPECIAL_TOKENS, (bos_token, eos_token, unk_token, pad_token), strict=True))
        self._named_tokens = {name: token for name, token in named.items() if token is not None}
        self._templates = {"default": chat_template} if isinstance(chat_template, str) else dict(chat_template or {})

        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        unmarked = {*self._named_tokens.values(), *additional_special_tokens} - marked
        tokenizer.add_special_tokens(sorted(t for t in unmarked if tokenizer.token_to_id(t) is not None))
        added = tokenizer.get_added_tokens_decoder()
        self._special_tokens = {token_id: token for token_id, token in sorted(added.items()) if token.special}

        self._bytes: dict[int, bytes] = {}
        self._context = tokenizer.encode("a", add_special_tokens=False).ids[-1:]
        self._check_decoder()

    @classmethod
    def from_dir(cls, path: str | Path, chat_template: str | None = None) -> Tokenizer:
        """Read tokenizer.json and, where present, tokenizer_config.json and chat_template.jinja.

        chat_template: jinja2 source used instead of the checkpoint's own. Otherwise chat_template.jinja wins
        over tokenizer_config.json. Raises `ValueError` naming the file that is missing or malformed.
        """
        import tokenizers

        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise ValueError(
                f"{file} does not exist. A checkpoint directory needs tokenizer.json; if it has tokenizer.model or "
                "vocab.json instead, AutoTokenizer.from_pretrained(dir).save_pretrained(dir) of transformers writes it"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"{file} is malformed or newer than the installed tokenizers library: {e}") from e

        file = path / "tokenizer_config.json"
        config = _read_json_object(file) if file.is_file() else {}
        more = config.get("additional_special_tokens") or []
        if not isinstance(more, list):
            raise ValueError(f"{file}: additional_special_tokens must be a list, got {more!r}")
        if chat_template is None and (path / "chat_template.jinja").is_file():
            chat_template = _read_text(path / "chat_template.jinja")
        return cls(
            tokenizer,
            **{name: _token_text(file, name, config.get(name)) for name in NAMED_SPECIAL_TOKENS},
            additional_special_tokens=[_token_text(file, "additional_special_tokens", t) for t in more],
            chat_template=_templates(file, config.get("chat_template")) if chat_template is None else chat_template,
        )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included. The model's embedding may have more rows (padding)."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token(self) -> str | None:
        return self._named_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self._named_tokens.get("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self._tokenizer.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """tokenizer_config.json's EOS. config.json and generation_config.json may name more."""
        return None if self.eos_token is None else self._tokenizer.token_to_id(self.eos_token)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids that `skip_special_tokens` leaves out, ascending."""
        return list(self._special_tokens)

    @property
    def chat_template(self) -> str | None:
        """jinja2 source of the default template."""
        return self._templates.get("default")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw text, in which special tokens may be written out, as in transformers and vLLM.

        add_special_tokens: also add what tokenizer.json prescribes around a text, such as BOS.
        Raises `ValueError` for anything but a string that UTF-8 can represent.
        """
        _check_utf8(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD. Raises `ValueError` for an id without a token."""
        token_ids = list(token_ids)
        self.convert_ids_to_tokens(token_ids)
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token_ids: Iterable[int]) -> list[str]:
        """Tokens as the vocabulary spells them, e.g. "Ġthe" or "▁the". Raises `ValueError` for an id without one."""
        return [self._token(token_id) for token_id in token_ids]

    def token_bytes(self, token_id: int, at_start: bool = False) -> bytes:
        """UTF-8 bytes that a token adds to a text which has already begun, possibly part of a character.

        at_start: at the beginning of a text, where SentencePiece drops the space in front of the first word.

        Empty for an id without a token: a model's embedding may have more rows than the vocabulary has tokens,
        and an untrained model samples them.
        """
        if at_start:
            return self._find_bytes(token_id, [])
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._find_bytes(token_id, self._context)
        return data

    def decode_token(self, token_id: int) -> str:
        """Text that one token adds to a text which has already begun; U+FFFD stands for partial characters."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation.

        messages: [{"role": str, "content": str}, ...]. content may also be a list of {"type": "text", "text": str},
            joined by newlines as in vLLM, or None for an assistant message with tool_calls. Further keys go to
            the template as they are.
        add_generation_prompt: end with the start of an assistant message.
        continue_final_message: leave the last message open, so that the model goes on with it.
        tools: JSON schemas of functions that the model may call.
        chat_template_kwargs: further variables of the template, e.g. {"enable_thinking": False}.

        Only the template's own text can become control tokens: the text of a special token inside messages,
        tools and chat_template_kwargs is tokenized as ordinary text. Raises `ValueError` for bad messages, for
        a missing or broken template and for one that leaves the sandbox or its budget.
        """
        text, literals = self._render(
            messages, add_generation_prompt, continue_final_message, tools, chat_template_kwargs
        )
        if not literals and not self._normalizes_special_tokens:
            return self.encode(text, add_special_tokens=False)
        return self._encode_guarded(text, literals)

    def render_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that `apply_chat_template` encodes. In it a user's special-token text looks like the real thing."""
        text, literals = self._render(
            messages, add_generation_prompt, continue_final_message, tools, chat_template_kwargs
        )
        return _put_back(text, literals)

    # ---- decoding

    def _token(self, token_id: int) -> str:
        token = None
        if isinstance(token_id, Integral) and not isinstance(token_id, bool) and 0 <= token_id < 2**32:
            token = self._tokenizer.id_to_token(token_id)
        if token is None:
            raise ValueError(f"token id {token_id!r} is not in the vocabulary of {self.vocab_size} tokens")
        return token

    def _find_bytes(self, token_id: int, context: list[int]) -> bytes:
        """Bytes that a token adds behind `context`. Only those that are no UTF-8 by themselves are spelled out here."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        before = self._tokenizer.decode(context, skip_special_tokens=False)
        text = self._tokenizer.decode([*context, token_id], skip_special_tokens=False)[len(before) :]
        if "\ufffd" in text:
            if re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's byte fallback
                return bytes([int(token[3:5], 16)])
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
        return text.encode()

    def _check_decoder(self) -> None:
        """`token_bytes` is right only where a text is its tokens joined; try that on a sample."""
        ids = self._tokenizer.encode("Ab ab, 1 ö.", add_special_tokens=False).ids
        whole = self._tokenizer.decode(ids, skip_special_tokens=False)
        parts = [self._find_bytes(ids[0], []), *map(self.token_bytes, ids[1:])] if ids else []
        if b"".join(parts) != whole.encode():
            raise ValueError(
                f"tokenizer.json: the decoder {type(self._tokenizer.decoder).__name__} is not supported, because a "
                "text is not its tokens joined; byte-level BPE and SentencePiece style (Metaspace) tokenizers are"
            )

    # ---- chat templates

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        kwargs: Mapping[str, Any] | None,
    ) -> tuple[str, dict[str, str]]:
        """Text in which single private-use characters stand for special-token text that the caller wrote.

        The second value maps these characters to what they stand for. One character survives anything that a
        template does to a string (trim, split, slice), and none is used that occurs in the input, so there is
        nothing to escape.
        """
        template = self._template_source(tools)
        inputs = {"messages": check_messages(messages), "tools": check_tools(tools), **check_template_kwargs(kwargs)}
        seen: list[str] = []
        inputs = map_strings(inputs, lambda text: seen.append(text) or text)
        words = "\n".join(seen)
        found = sorted(set(self._special_text.findall(words))) if self._special_text else []
        used = {*words, *template}
        unused = (char for char in map(chr, range(0xF0000, 0x10FFFE)) if char not in used)
        chars = list(islice(unused, len(found) + 1))
        if len(chars) <= len(found):
            raise ValueError("the messages use all private-use characters of Unicode (U+F0000 and above); remove some")
        *stand_ins, mark = chars
        stand_in = dict(zip(found, stand_ins, strict=True))
        if found:
            inputs = map_strings(inputs, lambda text: self._special_text.sub(lambda m: stand_in[m[0]], text))
        if continue_final_message:
            mark_final_message(inputs["messages"], mark, add_generation_prompt)
        variables = {
            "documents": None,
            **self._named_tokens,
            **inputs,
            "add_generation_prompt": bool(add_generation_prompt),
        }
        text = render_template(template, variables)
        if continue_final_message:
            text = cut_at_mark(text, mark)
        return text, {char: special for special, char in stand_in.items()}

    def _template_source(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            have = f"; it has {', '.join(sorted(self._templates))} only" if self._templates else ""
            raise ValueError(
                f"this tokenizer has no {name} chat template{have}. Give one (chat_template=...), or format the "
                "conversation yourself and use generate()"
            )
        return self._templates[name]

    @functools.cached_property
    def _special_text(self) -> re.Pattern[str] | None:
        """Finds the text of a special token, the longest first like the library."""
        texts = sorted((token.content for token in self._special_tokens.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @property
    def _normalizes_special_tokens(self) -> bool:
        """True where text could turn into a special token only by normalization, unseen by `_special_text`."""
        return self._tokenizer.normalizer is not None and any(t.normalized for t in self._special_tokens.values())

    def _encode_guarded(self, text: str, literals: dict[str, str]) -> list[int]:
        """Encode a rendered template so that only its own special-token text becomes special tokens.

        A second tokenizer takes every special token for plain text and knows a twin of each, with the same
        flags and a name that nobody can guess. The template's special tokens are renamed to their twins, then the
        user's are put back; one pass over the whole text keeps what depends on position and neighbours.
        """
        guarded, twin_of, original_id = self._guarded
        if self._special_text is not None:
            text = self._special_text.sub(lambda m: twin_of[m[0]], text)
        text = _put_back(text, literals)
        _check_utf8(text)
        return [original_id.get(i, i) for i in guarded.encode(text, add_special_tokens=False).ids]

    @functools.cached_property
    def _guarded(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """Second tokenizer, special-token text -> twin, id of twin -> id. Made on first use: it costs a load."""
        import tokenizers

        guarded = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        guarded.encode_special_tokens = True
        twin_of, original_id = {}, {}
        for token_id, token in self._special_tokens.items():
            twin = f"\U0010fffd{secrets.token_hex(16)}\U0010fffd"
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            guarded.add_tokens([tokenizers.AddedToken(twin, special=False, **flags)])
            twin_of[token.content] = twin
            original_id[guarded.token_to_id(twin)] = token_id
        return guarded, twin_of, original_id


def _put_back(text: str, literals: Mapping[str, str]) -> str:
    for char, special in literals.items():
        text = text.replace(char, special)
    return text


def _check_utf8(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, got {short(text)}")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(
            f"text holds {text[e.start]!r} at character {e.start}: half of a surrogate pair is not a character; "
            "decode the text properly or replace it"
        ) from None


# ---- reading files


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} cannot be read as UTF-8 text: {e}") from e


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(file))
    except (json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object, got {short(value)}")
    return value


def _token_text(file: Path, name: str, value: Any) -> str | None:
    """Text of a token, which transformers writes as a string or as {"content": ..., flags}."""
    text = value.get("content") if isinstance(value, dict) else value
    if value is not None and not (isinstance(text, str) and text):
        raise ValueError(f'{file}: {name} must be a string or {{"content": string}}, got {short(value)}')
    return text


def _templates(file: Path, value: Any) -> str | dict[str, str] | None:
    """A chat_template entry: a string, or a list of {"name": ..., "template": ...}."""
    if value is None or isinstance(value, str):
        return value
    entries = value if isinstance(value, list) else [value]
    if not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) and isinstance(e.get("template"), str) for e in entries
    ):
        raise ValueError(
            f'{file}: chat_template must be a string or a list of {{"name", "template"}}, got {short(value)}'
        )
    return {entry["name"]: entry["template"] for entry in entries}


def _byte_of_char() -> dict[str, int]:
    """The alphabet in which byte-level BPE spells bytes (GPT-2): printable Latin-1 as is, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()
