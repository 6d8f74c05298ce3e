"""Chat templates: jinja2 programs that come with a checkpoint, run in a sandbox and on a budget."""

from __future__ import annotations

import functools
import json
import re
import reprlib
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # takes long to import and is needed only when there is a conversation
    import jinja2

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
MAX_TEMPLATE_CHARS = 1 << 20
MAX_RENDERED_CHARS = 1 << 24
TEMPLATE_STEPS = 1 << 22  # a turn of a loop or 64 characters built is one step, a call is 16

# ---- what goes in


def short(value: Any) -> str:
    """repr for an error message, which must neither grow nor recurse with what a client sends."""
    shortener = reprlib.Repr()
    shortener.maxlevel, shortener.maxstring = 2, 100
    text = shortener.repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages in which every content is a string or None."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f'messages must be a non-empty list of {{"role": ..., "content": ...}}, got {short(messages)}')
    return [_check_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _check_message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'{where} must be a mapping {{"role": ..., "content": ...}}, got {short(message)}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where}: role must be a non-empty string such as 'user', got {short(role)}")
    if content is None:
        if role != "assistant" or not message.get("tool_calls"):
            raise ValueError(f"{where}: content is missing; only an assistant message with tool_calls may omit it")
    elif isinstance(content, (list, tuple)):
        content = "\n".join(_part_text(f"{where}: content[{i}]", part) for i, part in enumerate(content))
    elif not isinstance(content, str):
        raise ValueError(
            f'{where}: content must be a string or a list of {{"type": "text", "text": ...}}, got {short(content)}'
        )
    return {**message, "content": content}


def _part_text(where: str, part: Any) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f'{where} must be {{"type": "text", "text": ...}} (there is no image or audio input), got {short(part)}'
        )
    return part["text"]


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of JSON schemas (mappings), got {short(tools)}")
    return [dict(tool) for tool in tools]


def check_template_kwargs(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Further variables of a template; they may not replace its own."""
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise ValueError(f"chat_template_kwargs must be a mapping with names as keys, got {short(kwargs)}")
    reserved = {*_RESERVED_VARIABLES, *_template_environment().globals}
    if taken := sorted(reserved.intersection(kwargs)):
        raise ValueError(f"chat_template_kwargs must not set {', '.join(taken)}: the name is taken")
    return dict(kwargs)


def map_strings(value: Any, function: Callable[[str], str]) -> Any:
    """A copy of a JSON value with every string replaced. Anything else is refused: a template gets data, no objects."""
    try:
        if isinstance(value, str):
            return function(value)
        if isinstance(value, (list, tuple)):
            return [map_strings(item, function) for item in value]
        if isinstance(value, Mapping):
            return {map_strings(key, function): map_strings(item, function) for key, item in value.items()}
    except RecursionError:
        raise ValueError("messages, tools or chat_template_kwargs are nested too deeply; flatten them") from None
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise ValueError(f"messages, tools and chat_template_kwargs may hold JSON values only, got {short(value)}")


def mark_final_message(messages: list[dict[str, Any]], mark: str, add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise ValueError(
            "continue_final_message leaves no room for a generation prompt: use add_generation_prompt=False"
        )
    final = messages[-1]
    if final["content"] is None:
        raise ValueError("continue_final_message: the final message has no content to continue")
    final["content"] += mark + " "  # the space tells whether the template trims


def cut_at_mark(text: str, mark: str) -> str:
    before, found, after = text.rpartition(mark)
    if not found:
        raise ValueError("continue_final_message: the chat template leaves out the end of the final message")
    return before if after.startswith(" ") else before.rstrip()


# ---- the sandbox

_RESERVED_VARIABLES = frozenset(
    (
        *("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"),
        *NAMED_SPECIAL_TOKENS,
    )
)


class _Budget(threading.local):
    """Steps that the template rendered on this thread may still take."""

    steps = 0

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise OverflowError(f"it needs more than {TEMPLATE_STEPS} steps")

    def build(self, num_chars: int) -> None:
        if num_chars > MAX_RENDERED_CHARS:
            raise OverflowError(f"it builds a text or list of {num_chars} elements; the limit is {MAX_RENDERED_CHARS}")
        self.spend(1 + num_chars // 64)


def render_template(source: str, variables: dict[str, Any]) -> str:
    """Run a template; whatever goes wrong in it is a `ValueError`."""
    environment = _template_environment()
    environment.budget.steps = TEMPLATE_STEPS
    pieces, size = [], 0
    try:
        for piece in environment.compiled(source).generate(variables):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise OverflowError(f"its output is longer than {MAX_RENDERED_CHARS} characters")
    except _RefusedByTemplate as e:
        raise ValueError(f"the chat template does not accept this conversation: {str(e)[:500]}") from e
    except Exception as e:  # template code can raise anything
        where = f" (line {e.lineno})" if hasattr(e, "lineno") else ""
        raise ValueError(f"the chat template failed{where}: {type(e).__name__}: {str(e)[:500]}") from e
    return "".join(pieces)


@functools.cache
def _template_environment() -> jinja2.Environment:
    """jinja2's immutable sandbox with what transformers offers to chat templates, and a budget.

    The sandbox keeps a template from reaching Python. The budget bounds loops, calls, output and the usual ways of
    building huge strings, so that a careless or malicious template fails in seconds; it is not proof against every
    way to waste memory. Templates come from the checkpoint or from whoever starts the engine, never from a request.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.filters import do_format, do_indent
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(Extension):
        """{% generation %} marks what the assistant said, for training; here it only has to be accepted."""

        tags = frozenset({"generation"})

        def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Metered(NodeTransformer):
        """Sends what jinja2 does not let a sandbox intercept, loops and `~`, through filters of ours."""

        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "_iterate", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
            self.generic_visit(node)
            parts = nodes.List(node.nodes, lineno=node.lineno)
            return nodes.Filter(parts, "_concat", [], [], None, None, lineno=node.lineno)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "*", "**", "%"))

        def __init__(self) -> None:
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
            self.budget = budget = _Budget()
            self.compiled = functools.lru_cache(maxsize=16)(self._to_template)
            for name in ("batch", "center", "slice", "wordwrap"):  # pad or repeat by a number
                del self.filters[name]
            del self.globals["lipsum"]
            self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
            self.filters |= {
                "format": self._format,
                "indent": self._indent,
                "tojson": _tojson,
                "_concat": lambda parts: self.concat(map(str, parts)),
                "_iterate": self._iterate,
            }
            for name, function in self.filters.items():
                self.filters[name] = _metered(function, budget)

        def _to_template(self, source: str) -> jinja2.Template:
            if len(source) > MAX_TEMPLATE_CHARS:
                raise ValueError(f"it has {len(source)} characters; the limit is {MAX_TEMPLATE_CHARS}")
            return self.from_string(Metered().visit(self.parse(source)))

        def _iterate(self, items: Iterable[Any]) -> Any:
            items = items if hasattr(items, "__len__") else list(items)
            self.budget.spend(len(items))
            return items

        def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
            if isinstance(width, int):
                self.budget.build(width * (text.count("\n") + 1))
            return do_indent(text, width, first, blank)

        def _format(self, text: str, *args: Any, **kwargs: Any) -> str:
            _check_percent_format(text)
            return do_format(text, *args, **kwargs)

        def concat(self, parts: Iterable[str]) -> str:
            parts = list(parts)
            self.budget.build(sum(map(len, parts)))
            return "".join(parts)

        def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
            self.budget.build(_result_size(operator, left, right))
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: jinja2.runtime.Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            __self.budget.spend(16)
            result = super().call(__context, __obj, *args, **kwargs)
            __self.budget.build(_size(result))
            return result

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            padding = ("center", "expandtabs", "ljust", "rjust", "zfill")
            return attr not in padding and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                _check_brace_format(value.__self__)
            return wrapped

    return Sandbox()


class _RefusedByTemplate(Exception):
    pass


def _raise_exception(message: str) -> None:
    raise _RefusedByTemplate(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: plain JSON, where jinja2's own escapes HTML."""
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError(f"tojson: indent must be between 0 and 16, got {indent!r}")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    if ensure_ascii:  # but for the planes of private use, where our stand-ins live
        text = re.sub("[\x80-\U000effff]+", lambda m: json.dumps(m[0])[1:-1], text)
    return text


def _metered(function: Callable[..., Any], budget: _Budget) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja2's marks, such as "wants the context"
    def metered(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        budget.build(_size(result))
        return result

    return metered


def _size(value: Any) -> int:
    if isinstance(value, int):
        return 1 + value.bit_length() // 8
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _result_size(operator: str, left: Any, right: Any) -> int:
    """About how large `left operator right` gets: characters, elements or bytes."""
    if operator == "%":
        if isinstance(left, str):
            _check_percent_format(left)
        return _size(left)
    if operator in ("*", "**"):
        for factor, other in ((left, right), (right, left)):
            if isinstance(other, int) and (operator == "**" or not isinstance(factor, int)):
                return max(0, _size(factor)) * max(0, other)
    return _size(left) + _size(right)


# A width makes a short format string build a long text; `*` and nested braces take it from an argument.
_WIDE_PERCENT = re.compile(r"%(?:\([^)]*\))?[^%a-zA-Z]*(?:\*|\d{5})")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{5})")


def _check_percent_format(text: str) -> None:
    if _WIDE_PERCENT.search(text.replace("%%", "")):
        raise ValueError(f"format string {short(text)} with a large or computed width")


def _check_brace_format(text: str) -> None:
    if _WIDE_BRACES.search(text.replace("{{", "").replace("}}", "")):
        raise ValueError(f"format string {short(text)} with a large or computed width")
