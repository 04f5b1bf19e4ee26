"""Chat templates: how a conversation becomes the one string that is tokenized, in training and in inference alike.

    python template.py             list the templates
    python template.py vicuna      show a rendered sample, its trained spans in double brackets

A `Template` is a handful of patterns. `Template.render` fills them in; `Template.to_jinja` writes them out as a chat
template for `apply_chat_template` and serving engines. Both give the same string, character for character, so that a
model is served exactly what it was trained on.

Patterns contain slots: {content}, {bos} and {eos} (the tokenizer's tokens), {round0} and {round1} (number of the
round, from 0 and from 1). Everything else in a pattern is literal, braces around anything but a name included.

The text carries its own BOS and stop tokens: tokenize it with add_special_tokens=False. Contents are never altered,
except that they are trimmed where the model owner's template trims them. The module needs nothing but the standard
library.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

Message = Mapping[str, Any]


class TemplateError(ValueError):
    """A template that does not exist, or a conversation that a template cannot render."""


# ---------------------------------------------------------------------------------------------------------------------
# Patterns: one syntax, filled in by Python and compiled to jinja
# ---------------------------------------------------------------------------------------------------------------------

_SLOT = re.compile(r"\{([a-z][a-z0-9_]*)\}")


def _fill(pattern: str, slots: Mapping[str, str]) -> str:
    """`pattern` with its slots replaced. Split first, so that braces inside the values stay what they are."""
    parts = _SLOT.split(pattern)
    parts[1::2] = [slots[slot] for slot in parts[1::2]]
    return "".join(parts)


def _compile(pattern: str, slots: Mapping[str, str]) -> str:
    """The jinja expression that fills `pattern`; `slots` maps slot names to jinja expressions."""
    parts = _SLOT.split(pattern)
    terms = [slots[part] if i % 2 else _literal(part) for i, part in enumerate(parts) if i % 2 or part]
    return " ~ ".join(terms) or '""'


def _literal(text: str) -> str:
    """`text` as a jinja string literal (jinja reads Python's escapes, of which JSON's are a subset)."""
    return json.dumps(text, ensure_ascii=False)


def _json(value: Any, indent: int | None = None) -> str:
    """Exactly what the `tojson` filter of transformers' chat template environment gives."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


# ---------------------------------------------------------------------------------------------------------------------
# Tool calling
# ---------------------------------------------------------------------------------------------------------------------


class Listing(NamedTuple):
    """Patterns of an enumeration: text before it, one item, text between items, text after it."""

    opening: str
    item: str
    between: str
    closing: str


@dataclass(frozen=True)
class ToolFormat:
    """How tools, calls and results are written.

    Attributes:
        tools: the tool descriptions. Slots: {tool}, {tool4} (the OpenAI tool dict as JSON, compact or indented by 4),
            {function}, {function4} (its function), {name}, {description}, {schema} (its parameters).
        calls: the calls of one assistant turn. Slots: {name}, {arguments} (JSON), {id}.
        result: one tool result. Slots: {content}, {content_json}, {call_id}.
        placement: where the descriptions go: "after" or "before" the system text, in a system "turn" of their own, or
            in "front" of the first user turn.
        join: text between descriptions and system text ("after" and "before").
        text_join: text between what the assistant says and its first call; None: nothing can be said beside a call.
        result_join: results that follow one another share one user turn, with this text between them; None: `result`
            is a complete turn.
        one_call: the family knows only one call per assistant turn.
        bare: a call follows the generation prompt directly, without the template's `answer` pattern around it.
        call_stop: stop token of a call in templates whose stop token opens the next turn.
    """

    tools: Listing
    calls: Listing
    result: str
    placement: str = "after"
    join: str = "\n\n"
    text_join: str | None = "\n"
    result_join: str | None = "\n"
    one_call: bool = False
    bare: bool = False
    call_stop: str = ""


def _function(item: Any) -> Message:
    """The function of an OpenAI tool or tool call, {"type": "function", "function": {...}}, or of a flat one."""
    function = (item.get("function") or item) if isinstance(item, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"a tool or tool call needs a function with a name, found {item!r}")
    return function


def _name(item: Any) -> str:
    return _function(item)["name"]


def _arguments(call: Any) -> str:
    """The arguments of a call as JSON. A string is JSON already, as the OpenAI API gives it, and kept."""
    arguments = _function(call).get("arguments") or {}
    return arguments if isinstance(arguments, str) else _json(arguments)


# Each slot twice, side by side: its value in Python, and the expression that gives the same value in jinja, where the
# loop around it sets `function` and `arguments`.
_TOOL_SLOTS = {
    "tool": (_json, "tool | tojson"),
    "tool4": (lambda tool: _json(tool, 4), "tool | tojson(indent=4)"),
    "function": (lambda tool: _json(_function(tool)), "function | tojson"),
    "function4": (lambda tool: _json(_function(tool), 4), "function | tojson(indent=4)"),
    "name": (_name, "function.name"),
    "description": (lambda tool: _function(tool).get("description") or "", '(function.description or "")'),
    "schema": (lambda tool: _json(_function(tool).get("parameters") or {}), "(function.parameters or {}) | tojson"),
}
_CALL_SLOTS = {
    "name": (_name, "function.name"),
    "arguments": (_arguments, "(arguments if arguments is string else arguments | tojson)"),
    "id": (
        lambda call: f', "id": "{call["id"]}"' if call.get("id") else "",
        """(', "id": "' ~ call.id ~ '"' if call.id else "")""",
    ),
}
_RESULT_SLOTS = {
    "content": (lambda message: message["content"], "content"),
    "content_json": (lambda message: _json(message["content"]), "content | tojson"),
    "call_id": (
        lambda message: f', "call_id": "{message["tool_call_id"]}"' if message.get("tool_call_id") else "",
        """(', "call_id": "' ~ turn.tool_call_id ~ '"' if turn.tool_call_id else "")""",
    ),
}


def _fill_item(pattern: str, item: Any, slots: Mapping[str, tuple]) -> str:
    """`pattern` for one tool, call or result; only the slots it has are computed."""
    return _fill(pattern, {slot: slots[slot][0](item) for slot in _SLOT.findall(pattern)})


def _fill_listing(listing: Listing, items: Sequence[Any], slots: Mapping[str, tuple]) -> str:
    body = listing.between.join(_fill_item(listing.item, item, slots) for item in items)
    return listing.opening + body + listing.closing


def _expressions(slots: Mapping[str, tuple]) -> dict[str, str]:
    return {slot: expression for slot, (_, expression) in slots.items()}


TOOL_FORMATS: dict[str, ToolFormat] = {
    # Plain text, for families that never learned to call tools: descriptions in the system text, calls as Action and
    # Action Input, results in a user turn.
    "default": ToolFormat(
        tools=Listing(
            "You have access to the following tools:\n",
            "> Tool Name: {name}\nTool Description: {description}\nTool Args: {schema}\n",
            "",
            "Use the following format to call a tool:\nAction: tool name\nAction Input: arguments as a JSON object",
        ),
        calls=Listing("", "Action: {name}\nAction Input: {arguments}", "\n", ""),
        result="{content}",
    ),
    # Qwen2.5 and Qwen3, Hermes before them.
    "qwen": ToolFormat(
        tools=Listing(
            "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n",
            "{tool}",
            "\n",
            "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
            '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
            "<args-json-object>}\n</tool_call>",
        ),
        calls=Listing("", '<tool_call>\n{"name": "{name}", "arguments": {arguments}}\n</tool_call>', "\n", ""),
        result="<tool_response>\n{content}\n</tool_response>",
    ),
    # Llama 3.1 with its tools in the system turn. Its lines about the environment and the date are left out: the
    # first is for built-in tools, the second changes daily.
    "llama3": ToolFormat(
        tools=Listing(
            "You have access to the following functions. To call a function, please respond with JSON for a function "
            'call.Respond in the format {"name": function name, "parameters": dictionary of argument name and its '
            "value}.Do not use variables.\n\n",
            "{tool4}\n\n",
            "",
            "",
        ),
        calls=Listing("", '{"name": "{name}", "parameters": {arguments}}', "", ""),
        result="<|start_header_id|>ipython<|end_header_id|>\n\n{content_json}<|eot_id|>",
        placement="before",
        join="",
        text_join=None,
        result_join=None,
        one_call=True,
    ),
    # GLM-4. The owner's call stands directly after <|assistant|>; here it follows the newline that is part of the
    # generation prompt of glm4, because that is what the model is given.
    "glm4": ToolFormat(
        tools=Listing(
            "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
            "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具",
            "\n\n## {name}\n\n{function4}\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
            "",
            "",
        ),
        calls=Listing("", "{name}\n{arguments}", "", ""),
        result="<|observation|>\n{content}",
        placement="turn",
        text_join=None,
        result_join=None,
        one_call=True,
        bare=True,
        call_stop="<|observation|>",
    ),
    # Mistral v3. The owner puts the tools in front of the last user turn; here it is the first, as with the system
    # text, so that the text of a conversation does not change when it goes on.
    "mistral": ToolFormat(
        tools=Listing(
            "[AVAILABLE_TOOLS] [", '{"type": "function", "function": {function}}', ", ", "][/AVAILABLE_TOOLS]"
        ),
        calls=Listing("[TOOL_CALLS] [", '{"name": "{name}", "arguments": {arguments}{id}}', ", ", "]"),
        result='[TOOL_RESULTS] {"content": {content}{call_id}}[/TOOL_RESULTS]',
        placement="front",
        text_join=None,
        result_join=None,
        bare=True,
    ),
}
# Mistral's tekken tokenizers: the same without the blanks.
TOOL_FORMATS["mistral-tekken"] = replace(
    TOOL_FORMATS["mistral"],
    tools=TOOL_FORMATS["mistral"].tools._replace(opening="[AVAILABLE_TOOLS]["),
    calls=TOOL_FORMATS["mistral"].calls._replace(opening="[TOOL_CALLS]["),
    result='[TOOL_RESULTS]{"content": {content}{call_id}}[/TOOL_RESULTS]',
)


# ---------------------------------------------------------------------------------------------------------------------
# The template
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation.

    Attributes:
        text: the whole string, BOS and stop tokens included.
        spans: per trained assistant turn, in order, its characters [start, end): from the end of the generation prompt
            to the end of the stop token. What separates the stop token from the next turn is outside.
        turns: of each span, the index of its message.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    turns: tuple[int, ...] = field(default=(), compare=False)


# What the generation prompt of each kind of reasoning model holds of the think block.
_PREFILL = {"": "", "free": "", "prompted": "<think>\n", "closed": "<think>\n\n</think>\n\n"}


@dataclass(frozen=True)
class Template:
    r"""A chat layout. Read an instance as one round: system, user, assistant, answer, stop[0], separator.

    Attributes:
        name: the name it is registered under.
        user: the user turn.
        assistant: the header of an assistant turn, which is the generation prompt; not trained.
        answer: what the assistant writes, blanks around the content included; trained.
        stop: stop tokens; the first one ends every answer and is trained, the others only end generation.
        separator: what follows the stop token when another turn comes; not trained.
        final: the same after the last answer; None: the separator.
        system: the system turn; None: the family refuses system texts.
        prefix: the start of the text.
        default_system: the system text of conversations that have none; None: no system turn then.
        fold_system: the system turn is written into the first user turn, in front of its content.
        stop_opens_turn: the stop token is the token that opens the next turn, and is written once for both.
        trim: roles whose contents are trimmed, because the owner's template trims them.
        thinking: "" for models without think blocks. Otherwise answers after the last user turn carry their reasoning,
            <think>\n...\n</think>\n\n in front of the answer, and earlier reasoning is dropped, as the owners do.
            "free": the model opens the block itself; an empty one is written before the last answer only.
            "prompted": the generation prompt opens the block, so every answer after the last user turn has one.
            "closed": the generation prompt holds an empty block, and reasoning is never rendered.
            Earlier answers follow the plain `assistant` header, and so their spans start there.
        tool_format: how tools, calls and results are written, a key of TOOL_FORMATS.
        special: strings of the patterns that are single special tokens of the family's tokenizers.
    """

    name: str
    user: str
    assistant: str
    answer: str = "{content}"
    stop: tuple[str, ...] = ("</s>",)
    separator: str = ""
    final: str | None = None
    system: str | None = "{content}"
    prefix: str = "{bos}"
    default_system: str | None = None
    fold_system: bool = False
    stop_opens_turn: bool = False
    trim: tuple[str, ...] = ()
    thinking: str = ""
    tool_format: str = "default"
    special: tuple[str, ...] = ()

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        tools: list[dict] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Render a conversation.

        Args:
            messages: OpenAI style, {"role", "content"}; assistant turns may have "reasoning_content" and "tool_calls".
                An optional system message (an empty one counts as none), then user and assistant in turns; a user
                message may be the last. A turn with tool calls is followed by one or more tool messages and then by
                the assistant's next turn. Templates without think blocks ignore reasoning.
            bos_token: written once at the start (llama2: of every round) if the family has one; None: nothing.
            eos_token: needed by templates that stop with the tokenizer's own EOS, ignored by the others.
            tools: OpenAI tool dicts the model may call.
            add_generation_prompt: end with the generation prompt, for the model to continue.

        Raises:
            TemplateError: the roles are out of order, a content is not a string, the family has no place for what the
                conversation holds, or `eos_token` is missing.
        """
        renderer = _Renderer(self, {"bos": bos_token or "", "eos": self._eos(eos_token)}, tools or [])
        return renderer.run(messages, add_generation_prompt)

    def to_jinja(self, marked: bool = True) -> str:
        """The template as a chat_template for transformers and other programs.

        Args:
            marked: with {% generation %} around the trained spans, which transformers alone can read; without, it is
                jinja as anybody's.

        It reads messages, tools, bos_token, eos_token and add_generation_prompt, renders what `render` renders, and
        raises where `render` raises (contents that are not strings are left to the caller).
        """
        return _jinja(self, marked)

    def stop_tokens(self, eos_token: str | None = None) -> tuple[str, ...]:
        """Strings that end an answer. The first is the trained one.

        Raises:
            TemplateError: the template stops with the tokenizer's EOS and `eos_token` is None.
        """
        return tuple(_fill(stop, {"eos": self._eos(eos_token)}) for stop in self.stop)

    def control_tokens(self, eos_token: str | None = None) -> tuple[str, ...]:
        """The special tokens the template writes: each must be one token of the tokenizer, and in no content.

        The tokenizer's BOS is not among them, nor is what the family's models read as plain text ("[INST]" of llama2),
        nor what contents may hold on purpose ("<think>", "<tool_call>").

        Raises:
            TemplateError: as `stop_tokens`.
        """
        return tuple(dict.fromkeys((*self.special, self.stop_tokens(eos_token)[0])))

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern of the template, the one after the last answer at the end."""
        final = self.separator if self.final is None else self.final
        turns = (self.prefix, self.system or "", self.user, self.assistant, self.answer, *self.stop)
        return (*turns, self.separator, final)

    @property
    def needs_eos(self) -> bool:
        """Whether the template stops with the tokenizer's own EOS."""
        return any("{eos}" in pattern for pattern in self.patterns)

    def _eos(self, eos_token: str | None) -> str:
        if self.needs_eos and not eos_token:
            raise TemplateError(
                f"template {self.name!r} ends answers with the tokenizer's EOS token, and eos_token is {eos_token!r}: "
                "set the tokenizer's EOS token, or choose a template with a stop token of its own"
            )
        return eos_token or ""


# ---------------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------------

# Roles that may follow each state of a conversation; an assistant turn with tool calls is the state "call".
_NEXT_ROLES = {
    "start": ["user"],
    "user": ["assistant"],
    "assistant": ["user"],
    "call": ["tool"],
    "tool": ["tool", "assistant"],
}


def _check_content(index: int, message: Message) -> None:
    content, role = message.get("content"), message.get("role")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, str):
        raise TemplateError(f"messages[{index}]: content of role {role!r} is {type(content).__name__}, not a string")


def _check_roles(messages: Sequence[Message]) -> tuple[str, Sequence[Message]]:
    """The system text ("" without one) and the turns after it, checked."""
    first = 1 if messages and messages[0].get("role") == "system" else 0
    state = "start"
    for index, message in enumerate(messages):
        _check_content(index, message)
        if index < first:
            continue
        role = message.get("role")
        if role not in _NEXT_ROLES[state]:
            expected = " or ".join(map(repr, _NEXT_ROLES[state]))
            raise TemplateError(f"messages[{index}]: role {role!r} where {expected} is expected")
        state = "call" if role == "assistant" and message.get("tool_calls") else role
    if state == "start":
        raise TemplateError(f"messages[{first}]: no user message, nothing to render")
    return messages[0]["content"] if first else "", messages[first:]


def split_reasoning(message: Message, content: str) -> tuple[str, str]:
    """Reasoning and answer of a message; reasoning may stand inline, <think>...</think> in front of the answer.

    Qwen's way. DeepSeek's template would leave the newlines after </think> in front of an earlier answer, where those
    that come with "reasoning_content" have none.
    """
    if isinstance(message.get("reasoning_content"), str):
        return message["reasoning_content"], content
    if "</think>" not in content:
        return "", content
    parts = content.split("</think>")
    return parts[0].rstrip("\n").split("<think>")[-1].lstrip("\n"), parts[-1].lstrip("\n")


class _Renderer:
    """One conversation being rendered: the text so far and its spans. `_JINJA` below says the same in jinja."""

    def __init__(self, template: Template, slots: dict[str, str], tools: list[dict]):
        self.template = template
        self.tool_format = TOOL_FORMATS[template.tool_format]
        self.slots = slots
        self.tools = _fill_listing(self.tool_format.tools, tools, _TOOL_SLOTS) if tools else ""
        self.text = ""
        self.spans: list[tuple[int, int]] = []
        self.opened = ""  # the stop token just written, where it is the start of the next turn as well
        self.round = 0

    def run(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        system, turns = _check_roles(messages)
        first = len(messages) - len(turns)
        opening = self._opening(self._trim("system", system))
        self.text = self._fill(self.template.prefix)
        if not self.template.fold_system:
            self.text, opening = self.text + opening, ""
        if self.tool_format.placement == "front":
            self.text += self.tools
        last_user = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
        results: list[str] = []
        for index, turn in enumerate(turns):
            role = turn["role"]
            content = self._trim(role, turn.get("content") or "")
            following = turns[index + 1]["role"] if index + 1 < len(turns) else None
            if role == "user":
                self._user(opening + content if index == 0 else content)
            elif role == "assistant":
                where = f"messages[{first + index}]"
                self._assistant(turn, content, current=index > last_user, last=following is None, where=where)
            else:
                results.append(_fill_item(self.tool_format.result, {**turn, "content": content}, _RESULT_SLOTS))
                if following != "tool":
                    self._results(results)
                    results = []
        if add_generation_prompt:
            if turns[-1]["role"] == "assistant":
                raise TemplateError(f"messages[{len(messages) - 1}]: no generation prompt can follow role 'assistant'")
            self.text += self._fill(self.template.assistant + _PREFILL[self.template.thinking])
        answers = tuple(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return Rendered(self.text, tuple(self.spans), answers)

    def _fill(self, pattern: str, **slots: str) -> str:
        return _fill(pattern, {**self.slots, **slots})

    def _trim(self, role: str, content: str) -> str:
        return content.strip() if role in self.template.trim else content

    def _opening(self, system: str) -> str:
        """The system turn with the tools, as far as there is any."""
        placement, join = self.tool_format.placement, self.tool_format.join
        text = system or self.template.default_system
        turns = []
        if self.tools and placement == "after":
            text = text + join + self.tools if text else self.tools
        elif self.tools and placement == "before":
            text = self.tools + join + text if text else self.tools
        elif self.tools and placement == "turn":
            turns.append(self.tools)
        if text is not None:
            turns.append(text)
        if turns and self.template.system is None:
            raise TemplateError(f"messages[0]: role 'system': {_no_system(self.template)}")
        return "".join(self._fill(self.template.system or "", content=turn) for turn in turns)

    def _turn(self, text: str) -> None:
        self.text += text.removeprefix(self.opened)
        self.opened = ""

    def _user(self, content: str) -> None:
        rounds = {"round0": str(self.round), "round1": str(self.round + 1)}
        self._turn(self._fill(self.template.user, content=content, **rounds))
        self.round += 1

    def _results(self, results: list[str]) -> None:
        if self.tool_format.result_join is not None:
            self._user(self.tool_format.result_join.join(results))
            return
        for result in results:
            self._turn(result)

    def _assistant(self, turn: Message, content: str, *, current: bool, last: bool, where: str) -> None:
        template = self.template
        stop = self._fill(template.stop[0])
        think, content = self._think(turn, content, current, last)
        if turn.get("tool_calls"):
            answer = self._calls(turn["tool_calls"], content, where)
            stop = (template.stop_opens_turn and self.tool_format.call_stop) or stop
        else:
            answer = self._fill(template.answer, content=content)
        self.text += self._fill(template.assistant + (_PREFILL[template.thinking] if current else ""))
        start = len(self.text)
        self.text += think + answer + stop
        self.spans.append((start, len(self.text)))
        self.text += self._fill(template.patterns[-1] if last else template.separator)
        self.opened = stop if template.stop_opens_turn else ""

    def _think(self, turn: Message, content: str, current: bool, last: bool) -> tuple[str, str]:
        """The trained part of the think block, and the content without inline reasoning."""
        kind = self.template.thinking
        if not kind:
            return "", content
        reasoning, content = split_reasoning(turn, content)
        if not current or kind == "closed" or (kind == "free" and not (last or reasoning)):
            return "", content
        reasoning = reasoning.strip() if "assistant" in self.template.trim else reasoning.strip("\n")
        return f"<think>\n{reasoning}\n</think>\n\n".removeprefix(_PREFILL[kind]), content.lstrip("\n")

    def _calls(self, calls: list[dict], content: str, where: str) -> str:
        form = self.tool_format
        if form.one_call and len(calls) > 1:
            raise TemplateError(f"{where}: {len(calls)} tool calls: {_one_call(self.template)}")
        if content and form.text_join is None:
            raise TemplateError(f"{where}: content and tool_calls: {_no_text(self.template)}")
        text = (content + (form.text_join or "") if content else "") + _fill_listing(form.calls, calls, _CALL_SLOTS)
        return text if form.bare else self._fill(self.template.answer, content=text)


def _no_system(template: Template) -> str:
    return f"template {template.name!r} has no system role; put system text and tools into the first user message"


def _one_call(template: Template) -> str:
    return f"tool format {template.tool_format!r} has one call per turn; split the turn"


def _no_text(template: Template) -> str:
    return f"tool format {template.tool_format!r} has no place for text beside a call; drop the text"


# ---------------------------------------------------------------------------------------------------------------------
# The same in jinja
# ---------------------------------------------------------------------------------------------------------------------

# The exported program. <<name>> stands for an expression made from the template's patterns. A line that begins with
# [feature] or [!feature] is exported only for templates with, or without, that feature. Tags strip the white space
# around them, so the program's own line breaks are not rendered; text is written by expressions alone, because the
# environment's trim_blocks would swallow a newline after a block tag.
_JINJA = """\
{%- set ns = namespace(state="start", round=0, text="", last_user=0) -%}
{%- set next_roles = <<next_roles>> -%}
{%- set bos = bos_token or "" -%}
{%- set turns = messages -%}
{%- set system = "" -%}
{%- if messages and messages[0].role == "system" -%}
  {%- set turns = messages[1:] -%}
  {%- set system = messages[0].content -%}
[trim_system]  {%- set system = system | trim -%}
{%- endif -%}
{%- if not turns -%}{{- raise_exception("no user message, nothing to render") -}}{%- endif -%}
[eos]{%- if not eos_token -%}{{- raise_exception("the tokenizer has no eos_token") -}}{%- endif -%}
[default_system]{%- set system = system or <<default_system>> -%}
[no_system]{%- if system -%}{{- raise_exception(<<no_system>>) -}}{%- endif -%}
{%- set opening = "" -%}
{%- set tool_text = "" -%}
{%- if tools -%}
[no_tools]  {{- raise_exception(<<no_system>>) -}}
  {%- set ns.text = <<tools_opening>> -%}
  {%- for tool in tools -%}
    {%- set function = tool.function or tool -%}
    {%- set ns.text = ns.text ~ ("" if loop.first else <<tools_between>>) ~ <<tools_item>> -%}
  {%- endfor -%}
  {%- set tool_text = ns.text ~ <<tools_closing>> -%}
[after]  {%- set system = (system ~ <<join>> if system else "") ~ tool_text -%}
[before]  {%- set system = tool_text ~ (<<join>> ~ system if system else "") -%}
[turn]  {%- set opening = <<tools_turn>> -%}
{%- endif -%}
[always_system]{%- set opening = opening ~ <<system>> -%}
[!always_system]{%- if system -%}{%- set opening = opening ~ <<system>> -%}{%- endif -%}
{{- <<prefix>> -}}
[!fold]{{- opening -}}
[front]{{- tool_text -}}
[thinking]{%- for turn in turns -%}
[thinking]  {%- if turn.role == "user" -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
[thinking]{%- endfor -%}
{%- for turn in turns -%}
  {%- set role = turn.role -%}
  {%- if role not in next_roles[ns.state] -%}
    {{- raise_exception("role " ~ role ~ " where " ~ next_roles[ns.state] | join(" or ") ~ " is expected") -}}
  {%- endif -%}
  {%- set content = turn.content or "" -%}
[trim]  {%- if role in <<trim>> -%}{%- set content = content | trim -%}{%- endif -%}
  {%- if role == "user" -%}
[fold]    {%- if loop.first -%}{%- set content = opening ~ content -%}{%- endif -%}
    {{- (<<user_opened>>) if ns.state == "assistant" else (<<user>>) -}}
    {%- set ns.round = ns.round + 1 -%}
  {%- elif role == "tool" -%}
[own_results]    {{- (<<result_opened>>) if ns.state == "call" else (<<result>>) -}}
[!own_results]    {%- set ns.text = (ns.text ~ <<result_join>> if ns.state == "tool" else "") ~ <<result>> -%}
[!own_results]    {%- if loop.last or loop.nextitem.role != "tool" -%}
[!own_results]      {%- set content = ns.text -%}
[!own_results]      {{- <<user_after_call>> -}}
[!own_results]      {%- set ns.round = ns.round + 1 -%}
[!own_results]    {%- endif -%}
  {%- else -%}
    {%- set stop = <<stop>> -%}
    {%- set think = "" -%}
    {%- set prefill = "" -%}
[thinking]    {%- set reasoning = turn.reasoning_content -%}
[thinking]    {%- if reasoning is not string -%}
[thinking]      {%- set reasoning = "" -%}
[thinking]      {%- if "</think>" in content -%}
[thinking]        {%- set parts = content.split("</think>") -%}
[thinking]        {%- set reasoning = parts[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") -%}
[thinking]        {%- set content = parts[-1].lstrip("\\n") -%}
[thinking]      {%- endif -%}
[thinking]    {%- endif -%}
[thinking]    {%- if loop.index0 > ns.last_user -%}
[thinking]      {%- set prefill = <<prefill>> -%}
[writes_reasoning]      {%- if <<block_needed>> -%}
[writes_reasoning]        {%- set think = <<think>> -%}
[writes_reasoning]        {%- set content = content.lstrip("\\n") -%}
[writes_reasoning]      {%- endif -%}
[thinking]    {%- endif -%}
    {%- set answer = <<answer>> -%}
    {%- if turn.tool_calls -%}
[one_call]      {%- if turn.tool_calls | length > 1 -%}{{- raise_exception(<<one_call>>) -}}{%- endif -%}
[no_text]      {%- if content -%}{{- raise_exception(<<no_text>>) -}}{%- endif -%}
      {%- set ns.text = (content ~ <<text_join>> if content else "") ~ <<calls_opening>> -%}
      {%- for call in turn.tool_calls -%}
        {%- set function = call.function or call -%}
        {%- set arguments = function.arguments or {} -%}
        {%- set ns.text = ns.text ~ ("" if loop.first else <<calls_between>>) ~ <<calls_item>> -%}
      {%- endfor -%}
      {%- set content = ns.text ~ <<calls_closing>> -%}
      {%- set answer = <<call_answer>> -%}
[call_stop]      {%- set stop = <<call_stop>> -%}
    {%- endif -%}
    {{- <<assistant>> ~ prefill -}}
[marked]    {%- generation -%}{{- think ~ answer ~ stop -}}{%- endgeneration -%}
[!marked]    {{- think ~ answer ~ stop -}}
    {{- <<final>> if loop.last else <<separator>> -}}
  {%- endif -%}
  {%- set ns.state = "call" if role == "assistant" and turn.tool_calls else role -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {%- if ns.state in ["assistant", "call"] -%}
    {{- raise_exception("no generation prompt can follow role assistant") -}}
  {%- endif -%}
  {{- <<generation_prompt>> -}}
{%- endif -%}"""

_SLOTS = {"bos": "bos", "eos": "eos_token", "content": "content", "round0": "ns.round", "round1": "(ns.round + 1)"}


def _jinja(template: Template, marked: bool) -> str:
    form = TOOL_FORMATS[template.tool_format]
    features, expressions = _features(template, form), _program_expressions(template, form)
    features["marked"] = marked
    lines = []
    for line in _JINJA.split("\n"):
        match = re.match(r"\[(!?)(\w+)\]", line)
        if match is None or features[match[2]] != bool(match[1]):
            lines.append(re.sub(r"<<(\w+)>>", lambda slot: expressions[slot[1]], line[match.end() if match else 0 :]))
    return "\n".join(lines)


def _features(template: Template, form: ToolFormat) -> dict[str, bool]:
    no_system = template.system is None
    return {
        "trim_system": "system" in template.trim,
        "eos": template.needs_eos,
        "default_system": bool(template.default_system),
        "no_system": no_system,
        "no_tools": no_system and form.placement != "front",
        "always_system": template.default_system is not None,
        "fold": template.fold_system,
        **{placement: form.placement == placement for placement in ("after", "before", "turn", "front")},
        "thinking": bool(template.thinking),
        "writes_reasoning": template.thinking in ("free", "prompted"),
        "trim": bool(template.trim),
        "own_results": form.result_join is None,
        "one_call": form.one_call,
        "no_text": form.text_join is None,
        "call_stop": template.stop_opens_turn and bool(form.call_stop),
    }


def _program_expressions(template: Template, form: ToolFormat) -> dict[str, str]:
    def expression(pattern: str, opened: str = "", **slots: str) -> str:
        shared = opened if template.stop_opens_turn else ""
        return _compile(pattern.removeprefix(shared), {**_SLOTS, **slots})

    stop, call_stop = template.stop[0], form.call_stop or template.stop[0]
    prefill = _PREFILL[template.thinking]
    results = _expressions(_RESULT_SLOTS)
    reasoning = "reasoning | trim" if "assistant" in template.trim else 'reasoning.strip("\\n")'
    patterns = {
        "next_roles": json.dumps(_NEXT_ROLES),
        "trim": json.dumps(template.trim),
        "prefix": expression(template.prefix),
        "system": expression(template.system or "", content="system"),
        "user": expression(template.user),
        "user_opened": expression(template.user, stop),
        "user_after_call": expression(template.user, call_stop),
        "assistant": expression(template.assistant),
        "answer": expression(template.answer),
        "call_answer": expression("{content}" if form.bare else template.answer),
        "stop": expression(stop),
        "separator": expression(template.separator),
        "final": expression(template.patterns[-1]),
        "generation_prompt": expression(template.assistant + prefill),
        "think": expression("<think>\n{reasoning}\n</think>\n\n".removeprefix(prefill), reasoning=reasoning),
        "block_needed": "loop.last or reasoning" if template.thinking == "free" else "true",
        "tools_turn": expression(template.system or "", content="tool_text"),
        "tools_item": _compile(form.tools.item, _expressions(_TOOL_SLOTS)),
        "calls_item": _compile(form.calls.item, _expressions(_CALL_SLOTS)),
        "result": expression(form.result, **results),
        "result_opened": expression(form.result, call_stop, **results),
    }
    texts = {
        "default_system": template.default_system or "",
        "no_system": _no_system(template),
        "one_call": _one_call(template),
        "no_text": _no_text(template),
        "prefill": prefill,
        "tools_opening": form.tools.opening,
        "tools_between": form.tools.between,
        "tools_closing": form.tools.closing,
        "calls_opening": form.calls.opening,
        "calls_between": form.calls.between,
        "calls_closing": form.calls.closing,
        "join": form.join,
        "text_join": form.text_join or "",
        "result_join": form.result_join or "",
        "call_stop": form.call_stop,
    }
    return {**patterns, **{name: _literal(text) for name, text in texts.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------

_TEMPLATES: dict[str, Template] = {}
_NAMES: dict[str, str] = {}  # every spelling, normalized -> name


def _normalized(name: str) -> str:
    """One key for llama-2, llama2 and Llama_2."""
    return re.sub(r"[-_. ]", "", name.lower())


def _check_tool_format(name: str) -> None:
    if name not in TOOL_FORMATS:
        raise TemplateError(f"unknown tool format {name!r}; known: {', '.join(TOOL_FORMATS)}")


def register_template(name: str, *, aliases: Sequence[str] = (), **fields: Any) -> Template:
    """Add `Template(name, **fields)` under `name` and `aliases`; look-ups ignore case, "-", "_" and ".".

    Raises:
        TemplateError: one of the names is taken, or the tool format is unknown.
    """
    template = Template(name, **fields)
    _check_tool_format(template.tool_format)
    for spelling in (name, *aliases):
        if _normalized(spelling) in _NAMES:
            raise TemplateError(f"template name {spelling!r} is taken by {_NAMES[_normalized(spelling)]!r}")
    _NAMES.update({_normalized(spelling): name for spelling in (name, *aliases)})
    _TEMPLATES[name] = template
    return template


def get_template(name: str, tool_format: str | None = None) -> Template:
    """The template called `name`, with `tool_format` (a key of TOOL_FORMATS) instead of its own if one is given.

    `name` may be one that with_role_markers has made: mft {"user": "U:"}

    Raises:
        TemplateError: unknown template or tool format; the message lists the nearest names.
    """
    name, markers = _split_markers(name)
    if markers:
        return with_role_markers(get_template(name, tool_format), markers)
    key = _normalized(name)
    if key not in _NAMES:
        nearest = dict.fromkeys(_NAMES[near] for near in difflib.get_close_matches(key, _NAMES, n=5, cutoff=0.5))
        listed = f"nearest: {', '.join(nearest)}" if nearest else f"known: {', '.join(template_names())}"
        raise TemplateError(f"unknown template {name!r}; {listed}")
    template = _TEMPLATES[_NAMES[key]]
    if tool_format is None:
        return template
    _check_tool_format(tool_format)
    return replace(template, tool_format=tool_format)


def template_names() -> tuple[str, ...]:
    """The names of all templates, sorted, without their aliases."""
    return tuple(sorted(_TEMPLATES))


def _split_markers(name: str) -> tuple[str, dict[str, str]]:
    """A template's own name, and the role markers behind it."""
    own, found, rest = name.partition(" {")
    if not found:
        return name, {}
    try:
        return own, json.loads("{" + rest)
    except ValueError as error:
        raise TemplateError(f"{name!r}: role markers that are not JSON: {error}") from None


def with_role_markers(template: Template, markers: Mapping[str, str]) -> Template:
    """`template` with other texts before its turns: {"system": ..., "user": ..., "assistant": ...}, each optional.

    Its name says so, and get_template finds it by that name: what is written down of a training is all of it.

    Raises:
        TemplateError: an unknown role, or a marker that is no text or has a slot in it.
    """
    roles = {"system": template.system or "{content}", "user": template.user, "assistant": "{content}"}
    changed: dict[str, Any] = {}
    for role, marker in markers.items():
        if role not in roles:
            raise TemplateError(f"role markers: unknown role {role!r}; known: {', '.join(roles)}")
        if not isinstance(marker, str) or _SLOT.search(marker):
            raise TemplateError(f"role markers: {role} is {marker!r}; expected a text without words in braces")
        changed[role] = marker if role == "assistant" else marker + roles[role][roles[role].index("{content}") :]
    if changed:
        name, earlier = _split_markers(template.name)
        changed["name"] = f"{name} {json.dumps({**earlier, **markers}, ensure_ascii=False, sort_keys=True)}"
    template = replace(template, **changed)
    written = "".join(template.patterns)
    return replace(template, special=tuple(token for token in template.special if token in written))


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------
# The model owner's rendering wins. Answers end with their stop token in every turn, also where the owner's own history
# omits it (baichuan, chatglm, chatglm2, falcon): a model that never sees it does not learn to stop. Where there is no
# owner's form, the majority of the layouts in circulation is taken and the comment says so.

# fmt: off

_EOS = ("{eos}",)  # families without a tokenizer of their own stop with the EOS of the tokenizer they are used with

# Layout families, used below as **CHATML.
_CHATML: dict[str, Any] = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n", "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n", "stop": ("<|im_end|>",), "separator": "\n",
    "special": ("<|im_start|>", "<|im_end|>")}
_QWEN: dict[str, Any] = {**_CHATML, "prefix": "", "tool_format": "qwen"}
_QWEN3_5: dict[str, Any] = {**_QWEN, "trim": ("system", "user", "assistant", "tool")}
_LLAMA2: dict[str, Any] = {
    "system": "<<SYS>>\n{content}\n<</SYS>>\n\n", "assistant": "", "answer": " {content} ", "fold_system": True}
_MISTRAL: dict[str, Any] = {"system": "{content}\n\n", "fold_system": True, "assistant": ""}
_MISTRAL_SPECIAL = (
    "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]")
_GLM: dict[str, Any] = {
    "system": "<|system|>\n{content}", "user": "<|user|>\n{content}", "stop_opens_turn": True, "tool_format": "glm4"}
_GLM_SPECIAL = ("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_GEMMA: dict[str, Any] = {
    "user": "<start_of_turn>user\n{content}<end_of_turn>\n", "assistant": "<start_of_turn>model\n",
    "stop": ("<end_of_turn>",), "separator": "\n", "trim": ("user", "assistant"),
    "special": ("<start_of_turn>", "<end_of_turn>")}
_DEEPSEEK_EOS = "<｜end▁of▁sentence｜>"
_DEEPSEEK: dict[str, Any] = {
    "user": "<｜User｜>{content}", "assistant": "<｜Assistant｜>", "stop": (_DEEPSEEK_EOS,),
    "special": ("<｜User｜>", "<｜Assistant｜>")}

# ---- No layout, or no model: for any tokenizer

# Query and answer, nothing else.
register_template("vanilla", user="{content}", assistant="", stop=_EOS)

# The same; the name has no official layout, and everyone's has no text in it.
register_template("base", user="{content}", assistant="", stop=_EOS)

# The word has unrelated layouts; this is LLaMA-Factory's, whose EOS ends every turn.
register_template("default",
    system="System: {content}{eos}\n", user="Human: {content}{eos}\n", assistant="Assistant:", stop=_EOS,
    separator="\n")

# Stanford defines a single turn only. Several rounds: the newline after "Response:" and the joint are the majority's.
register_template("alpaca",
    system="{content}\n\n",
    default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.",
    user="### Instruction:\n{content}\n\n", assistant="### Response:\n", stop=_EOS, separator="\n\n", final="")

# MFTCoder's code: a newline after every content, EOS after the answer's, then an untrained newline. It begins with
# <s> as it is, so no BOS is added; tokenizers without a token <s> read the markers as text.
register_template("mft",
    prefix="", system="<s>system\n{content}\n", user="<s>human\n{content}\n", assistant="<s>bot\n",
    answer="{content}\n", stop=_EOS, separator="\n")

# belle and linly: MedicalGPT's is the only layout in circulation.
register_template("belle",
    system="{content}\n\n", user="Human: {content}", assistant="\n\nBelle: ", stop=_EOS, separator="\n\n", final="")
register_template("linly",
    system="{content}\n", user="User: {content}", assistant="\nBot: ", stop=_EOS, separator="\n", final="")

# ---- Llama and its descendants

# FastChat's code, blanks between the turns; its documentation prints newlines.
register_template("vicuna",
    system="{content} ",
    default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    user="USER: {content}", assistant=" ASSISTANT:", answer=" {content}")

# meta-llama's chat_completion: BOS opens every round, contents are stripped.
register_template("llama2", **_LLAMA2, prefix="", user="{bos}[INST] {content} [/INST]", trim=("user", "assistant"))

# FastChat's chinese-alpaca2: BOS follows every stop token, after the last answer too.
register_template("llama2-zh",
    **_LLAMA2,
    default_system="You are a helpful assistant. 你是一个乐于助人的助手。请你提供专业、有逻辑、内容真实、"
        "有价值的详细回复。",
    user="[INST] {content} [/INST]", separator="{bos}")

# Llama 3. The template that Llama 3.1 ships adds dates to the system turn: leave the template name out there.
register_template("llama3",
    system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n", stop=("<|eot_id|>",),
    trim=("system", "user", "assistant"), tool_format="llama3",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))

# Mistral v1 as shipped in 2024-09: "<s> [INST] q [/INST] a</s> [INST] ...". [INST] is text, not a token, before v2.
register_template("mistral",
    **_MISTRAL, aliases=("mistral-v1",), user=" [INST] {content} [/INST]", answer=" {content}")

# Mistral v2 and v3, system text in the first user turn as in v1.
register_template("mistral-v3",
    **_MISTRAL, aliases=("mistral-v2",), user="[INST] {content}[/INST]", answer=" {content}", tool_format="mistral",
    special=_MISTRAL_SPECIAL)

# Mistral's tekken tokenizers (Nemo and later).
register_template("mistral-tekken",
    **_MISTRAL, user="[INST]{content}[/INST]", tool_format="mistral-tekken", special=_MISTRAL_SPECIAL)

# alignment-handbook's zephyr-7b-beta. Its role markers are text.
register_template("zephyr",
    system="<|system|>\n{content}</s>\n", user="<|user|>\n{content}</s>\n", assistant="<|assistant|>\n",
    separator="\n")

# The shipped template writes "GPT4 Correct System: "; its author advises the bare system text.
register_template("openchat",
    system="{content}<|end_of_turn|>", user="GPT4 Correct User: {content}<|end_of_turn|>",
    assistant="GPT4 Correct Assistant:", answer=" {content}", stop=("<|end_of_turn|>",))

# No owner's form for several rounds, and ms-swift's differs: these are MedicalGPT's newlines.
register_template("ziya",
    system="{content}\n", user="<human>:{content}", assistant="\n<bot>:", separator="\n", final="")

# FastChat's; MedicalGPT's differs by a </s> in front of Human and no <s> in front of the answer.
register_template("phoenix",
    default_system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n",
    user="Human: <s>{content}</s>", assistant="Assistant: <s>", special=("<s>", "</s>"))

# ---- ChatML and Qwen

register_template("chatml", **{**_CHATML, "stop": ("<|im_end|>", "</s>")})

# Qwen2.5. Qwen 1, 1.5 and 2 have another default system text: qwen2.
register_template("qwen",
    **_QWEN, aliases=("qwen2.5",),
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
register_template("qwen2", **_QWEN, aliases=("qwen1.5",), default_system="You are a helpful assistant.")

# Qwen3 opens its think block itself; qwen3_nothink is the instruct model of 2507.
register_template("qwen3", **_QWEN, thinking="free")
register_template("qwen3_nothink", **_QWEN)

# Qwen3.5 writes calls as markup of its own, which is no --tool_format: with tools, use the tokenizer's own template.
register_template("qwen3_5", **_QWEN3_5, thinking="prompted")
register_template("qwen3_5_nothink", **_QWEN3_5, thinking="closed")

# FastChat's: the system text without the <|im_start|>system wrapper.
register_template("yi", **{**_CHATML, "system": "{content}<|im_end|>\n"})

# LLaMA-Factory and ms-swift agree but for the end.
register_template("intern2",
    **{**_CHATML, "stop": ("<|im_end|>", "</s>")}, aliases=("internlm2",),
    default_system="You are an AI assistant whose name is InternLM (书生·浦语).\n"
        "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
        "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
        "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
        "English and 中文.")

# internlm-chat-7b as FastChat cites it, <s> in front of every round; later versions have no <s>, then no <eoh>.
register_template("intern",
    aliases=("internlm",),
    default_system="A chat between a curious <|User|> and an <|Bot|>. "
        "The <|Bot|> gives helpful, detailed, and polite answers to the <|User|>'s questions.\n\n",
    user="<s><|User|>:{content}<eoh>\n", assistant="<|Bot|>:", stop=("<eoa>", "</s>"), separator="\n",
    special=("<s>", "<eoh>", "<eoa>"))

# ---- GLM

# The owner's round numbers: from 0 in chatglm, from 1 in chatglm2.
register_template("chatglm",
    system="{content}\n", user="[Round {round0}]\n问：{content}", assistant="\n答：", stop=("<eop>",), separator="\n")
# The owner's tokenizers begin with [gMASK]sop, so the text does too. "sop" is left out of `special`: it is part of
# ordinary words ("philosophy"), which must not be refused.
register_template("chatglm2",
    prefix="[gMASK]sop", system="{content}\n\n", user="[Round {round1}]\n\n问：{content}", assistant="\n\n答：",
    separator="\n\n", special=("[gMASK]",))
# The stop token is the role token of the next turn.
register_template("chatglm3",
    **_GLM, prefix="[gMASK]sop", assistant="<|assistant|>", answer="\n{content}",
    stop=("<|user|>", "</s>", "<|observation|>"), special=_GLM_SPECIAL)
register_template("glm4",
    **_GLM, prefix="[gMASK]<sop>", assistant="<|assistant|>\n", stop=("<|user|>", "<|endoftext|>", "<|observation|>"),
    special=("<sop>", *_GLM_SPECIAL))

# ---- DeepSeek

# DeepSeek LLM and V2.
register_template("deepseek",
    system="{content}\n\n", user="User: {content}\n\n", assistant="Assistant:", answer=" {content}",
    stop=(_DEEPSEEK_EOS,))
# V3 and V3-0324 answer at once; R1 and its distilled models open a think block in the prompt.
register_template("deepseek3", **_DEEPSEEK, aliases=("deepseek-v3",))
register_template("deepseek_r1", **_DEEPSEEK, aliases=("deepseek-r1-distill",), thinking="prompted")

# A given system text is followed by "### Instruction:" without a newline, as the owner has it.
register_template("deepseekcoder",
    default_system="You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek "
        "Company, and you only answer questions related to computer science. For politically sensitive questions, "
        "security and privacy issues, and other non-computer science questions, you will refuse to answer\n",
    user="### Instruction:\n{content}\n", assistant="### Response:\n", answer="{content}\n",
    stop=("<|EOT|>", _DEEPSEEK_EOS), separator="\n")

# ---- Others

register_template("gemma", **_GEMMA, aliases=("gemma2",), system=None)
register_template("gemma3", **_GEMMA, system="{content}\n\n", fold_system=True)

# The shipped template ends a finished text with <|endoftext|>; answers stop with <|end|>.
register_template("phi3",
    system="<|system|>\n{content}<|end|>\n", user="<|user|>\n{content}<|end|>\n", assistant="<|assistant|>\n",
    stop=("<|end|>",), separator="\n", final="\n<|endoftext|>",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"))

# FastChat, citing the owner's generation_config.
register_template("baichuan",
    user="<reserved_102>{content}", assistant="<reserved_103>", special=("<reserved_102>", "<reserved_103>"))
register_template("baichuan2",
    user="<reserved_106>{content}", assistant="<reserved_107>", special=("<reserved_106>", "<reserved_107>"))

# As a public adapter documents it and ms-swift has it.
register_template("xverse", user="Human: {content}", assistant="\n\nAssistant: ", stop=("<|endoftext|>",))

# BAAI's predict.py picks a layout per model; this is the one of AquilaChat2 *-16k.
register_template("aquila",
    system="{content}###",
    default_system="A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.",
    user="Human: {content}###", assistant="Assistant:", answer=" {content}", stop=("</s>", "###"))

# bigcode-project/starcoder: the system turn is there even when it is empty.
register_template("starchat",
    system="<|system|>\n{content}<|end|>\n", default_system="", user="<|user|>\n{content}<|end|>\n",
    assistant="<|assistant|>", answer="\n{content}", stop=("<|end|>", "<|endoftext|>"), separator="\n",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"))

# At least four layouts in circulation, none the owner's: FastChat's, the majority's at most joints.
register_template("falcon",
    prefix="", user="User: {content}\n\n", assistant="Assistant:", answer=" {content}", stop=("<|endoftext|>",),
    separator="\n\n")

# The shipped template drops system texts; ms-swift writes them in front.
register_template("orion", user="Human: {content}\n\n", assistant="Assistant: </s>", special=("</s>",))

register_template("cohere",
    system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
    user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{content}<|END_OF_TURN_TOKEN|>",
    assistant="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", stop=("<|END_OF_TURN_TOKEN|>",), trim=("user", "assistant"),
    special=("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>",
        "<|CHATBOT_TOKEN|>"))

# fmt: on


# ---------------------------------------------------------------------------------------------------------------------
# On the command line
# ---------------------------------------------------------------------------------------------------------------------

_SAMPLE = (
    {"role": "system", "content": "You are a physician."},
    {"role": "user", "content": "What is anaemia?"},
    {"role": "assistant", "content": "A lack of red blood cells."},
    {"role": "user", "content": "And its causes?"},
    {"role": "assistant", "content": "Often a lack of iron.", "reasoning_content": "Name the most common one."},
)


def sample(template: Template) -> str:
    """A rendered conversation for the eye, each trained span between [[ and ]]."""
    messages = _SAMPLE if template.system is not None else _SAMPLE[1:]
    rendered = template.render(messages, bos_token="<bos>", eos_token="<eos>")
    shown, position = "", 0
    for start, end in rendered.spans:
        shown += f"{rendered.text[position:start]}[[{rendered.text[start:end]}]]"
        position = end
    return shown + rendered.text[position:]


def main(arguments: Sequence[str]) -> int:
    """List the templates, or show the sample of the named ones. The exit status is 2 for an unknown name."""
    try:
        print("\n\n".join(map(sample, map(get_template, arguments))) if arguments else "\n".join(template_names()))
    except TemplateError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
