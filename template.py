"""Chat templates: one entry for each model family, rendered the same way for training, inference and serving.

    python template.py             lists the templates
    python template.py vicuna      shows a conversation, the trained characters marked

`get_template(name).render(messages)` gives the text and the spans that are trained; `to_jinja()` gives the same text as a
Hugging Face chat template, built from the same strings. Standard library only.
"""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]

# Placeholders in the strings of an entry.
BOS, EOS, ROUND = "{bos}", "{eos}", "{round}"
THINK_OPEN, THINK_CLOSE = "<think>\n", "\n</think>\n\n"


class TemplateError(ValueError):
    """A conversation that a template cannot render, or a template that is not there."""


@dataclass(frozen=True)
class Rendered:
    """text, and for each assistant turn the characters [start, end) that are trained.

    A span begins where the generation prompt ends and includes the stop token, not the separator after it.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ToolFormat:
    """How tools, calls and results are written.

    tools: put after the system text (before it, alone, if there is none): `opening`, one `item` for each tool joined by
    `item_separator`, `closing`; {name} and {json} stand for the tool's name and its JSON. Calls: `call` for each,
    joined by `call_separator`, between `calls_opening` and `calls_closing`, after the answer's text; {name},
    {arguments}. Results: `result` for each, joined by `result_separator`; {content}.

    `default` is plain text for models without a format of their own: tool descriptions in the system text, calls as
    "Action: name" and "Action Input: {json}", results in a user turn. The others are the families'.
    """

    name: str
    opening: str
    item: str
    item_separator: str
    closing: str
    call: str
    call_separator: str = "\n"
    calls_opening: str = ""
    calls_closing: str = ""
    result: str = "{content}"
    result_separator: str = "\n"
    indent: int | None = None


_CALL_JSON = '{"name": "{name}", "arguments": {arguments}}'
TOOL_FORMATS = {
    tool_format.name: tool_format
    for tool_format in (
        ToolFormat(
            "default",
            opening="You have access to the following tools:\n",
            item="{json}",
            item_separator="\n",
            closing=(
                "\nTo use a tool, answer in this form:\nAction: the name of the tool\n"
                "Action Input: its arguments as a JSON object"
            ),
            call="Action: {name}\nAction Input: {arguments}",
        ),
        ToolFormat(  # Qwen2.5's and Qwen3's tokenizer_config.json
            "qwen",
            opening=(
                "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
                "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
            ),
            item="{json}",
            item_separator="\n",
            closing=(
                "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
                '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": '
                "<args-json-object>}\n</tool_call>"
            ),
            call=f"<tool_call>\n{_CALL_JSON}\n</tool_call>",
            result="<tool_response>\n{content}\n</tool_response>",
        ),
        ToolFormat(  # Llama 3.1's zero-shot JSON calls; the text that stands in its user turn is in the system turn here
            "llama3",
            opening=(
                "You have access to the following functions. To call a function, please respond with JSON for a "
                'function call. Respond in the format {"name": function name, "parameters": dictionary of argument '
                "name and its value}. Do not use variables.\n\n"
            ),
            item="{json}",
            item_separator="\n\n",
            closing="",
            call='{"name": "{name}", "parameters": {arguments}}',
            call_separator="; ",
            indent=4,
        ),
        ToolFormat(  # GLM-4's system text
            "glm4",
            opening="# 可用工具\n\n",
            item="## {name}\n\n{json}\n在调用上述函数时，请使用 Json 格式表示调用的参数。",
            item_separator="\n\n",
            closing="",
            call="{name}\n{arguments}",
            indent=4,
        ),
        ToolFormat(  # Mistral v3; the owner puts the tools in front of the last user turn, here they are in the first
            "mistral",
            opening="[AVAILABLE_TOOLS] [",
            item="{json}",
            item_separator=", ",
            closing="][/AVAILABLE_TOOLS]",
            call=_CALL_JSON,
            call_separator=", ",
            calls_opening="[TOOL_CALLS] [",
            calls_closing="]",
            result='[TOOL_RESULTS] {"content": {content}}[/TOOL_RESULTS]',
            result_separator="",
        ),
    )
}


@dataclass(frozen=True)
class Template:
    """What a family writes around the contents of a conversation. Strings may hold {bos}, {eos} and {round}.

    system: (before the system text, between it and the first user turn); None: the family refuses a system turn.
    no_system: before the first user turn when there is no system turn, a default system text included.
    prompt: between a user turn and the answer, up to where generation starts.
    stop: ends every answer and is trained; {eos} is the tokenizer's own. other_stops also end a generation.
    next_user: between the stop token and the next user turn (where the stop token is the next role's token, what
        follows it). next_tool: the same before a tool result; None: as next_user.
    end: after the last answer's stop token.
    answer: (before, after) the answer's text inside the trained span.
    bos: the text begins with the tokenizer's bos_token.
    special: the strings above that are single control tokens of the family's tokenizers (BOS and {eos} aside).
    trim: contents lose leading and trailing white space, as the owner's template does.
    first_round: the number that {round} has in the first round.
    thinking: where the reasoning of the answers after the last user turn stands (earlier reasoning is dropped):
        None: nowhere. "answer": a <think> block begins the last answer, empty or not, and is trained. "prompt": <think>
        ends the generation prompt, the rest of the block is trained. "closed": an empty block ends the generation
        prompt. With "prompt" and "closed" earlier answers have no block, so their spans begin after the plain prompt.
    tool_format: the family's name in TOOL_FORMATS. tool_stop: the stop token of an answer that ends with calls.
    """

    name: str
    system: tuple[str, str] | None
    no_system: str
    prompt: str
    stop: str
    next_user: str
    end: str = ""
    answer: tuple[str, str] = ("", "")
    bos: bool = True
    special: tuple[str, ...] = ()
    other_stops: tuple[str, ...] = ()
    trim: bool = False
    first_round: int = 1
    thinking: str | None = None
    tool_format: str = "default"
    next_tool: str | None = None
    tool_stop: str | None = None

    def stop_tokens(self, eos_token: str | None = None) -> tuple[str, ...]:
        """The strings that end an answer; the first is the one that is trained."""
        stops = (self.stop, *self.other_stops, *((self.tool_stop,) if self.tool_stop else ()))
        return tuple(dict.fromkeys(self._fill(stop, None, eos_token) for stop in stops))

    def control_tokens(self, eos_token: str | None = None) -> tuple[str, ...]:
        """Control tokens that the template writes: each must be one token of the tokenizer, and none may be in contents."""
        return tuple(dict.fromkeys([*self.special, self._fill(self.stop, None, eos_token)]))

    def render(
        self,
        messages: Sequence[Message],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        tools: Sequence[Mapping] | None = None,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """The text of a conversation, with the trained span of each assistant turn.

        Args:
            messages: {"role": "system" | "user" | "assistant" | "tool", "content": str}; an assistant message may have
                reasoning_content and tool_calls (OpenAI's list). A system message only first; it may end with a user
                turn.
            bos_token, eos_token: the tokenizer's.
            tools: OpenAI tool dicts, written into the system turn.
            add_generation_prompt: end with what stands before an answer.

        Raises:
            TemplateError: roles out of order, a system turn that the family refuses, reasoning where there is no place
                for it, a missing eos_token.
        """
        system, turns = self._split_system(messages, tools)
        check_order(turns)
        fill = self._filler(bos_token, eos_token)
        text = fill(BOS if self.bos else "")
        text += fill(self.no_system) if system is None else fill(self.system[0]) + system + fill(self.system[1])
        last_user = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=-1)
        spans: list[tuple[int, int]] = []
        number = self.first_round
        for i, turn in enumerate(turns):
            role, before = turn["role"], turns[i - 1]["role"] if i else "system"
            final = i == len(turns) - 1
            if role == "assistant":
                prefix, body = self._answer_parts(turn, i > last_user, final)
                stop = self.tool_stop if turn.get("tool_calls") and self.tool_stop else self.stop
                text += fill(self.prompt, number) + prefix
                spans.append((len(text), len(text) + len(body) + len(fill(stop))))
                text += body + fill(stop) + (fill(self.end) if final else "")
                continue
            if role == "user":
                number += before != "system" and i > 0
                text += (fill(self.next_user, number) if i else "") + self._content(turn)
            else:
                opening = self.next_user if self.next_tool is None else self.next_tool
                text += self._tools.result_separator if before == "tool" else fill(opening, number)
                text += self._tool_result(turn)
        if add_generation_prompt:
            text += fill(self.prompt, number) + self._prompt_thinking()
        return Rendered(text, tuple(spans))

    @property
    def _tools(self) -> ToolFormat:
        return TOOL_FORMATS[self.tool_format]

    def _fill(self, text: str, bos_token: str | None, eos_token: str | None, number: int | None = None) -> str:
        if EOS in text and not eos_token:
            raise TemplateError(
                f"template {self.name}: ends answers with the tokenizer's eos_token, and this tokenizer has none"
            )
        number = self.first_round if number is None else number
        return text.replace(BOS, bos_token or "").replace(EOS, eos_token or "").replace(ROUND, str(number))

    def _filler(self, bos_token: str | None, eos_token: str | None):
        return lambda text, number=None: self._fill(text, bos_token, eos_token, number)

    def _split_system(self, messages: Sequence[Message], tools) -> tuple[str | None, list[Message]]:
        """(system text with the tools in it or None, the other messages)."""
        if not messages:
            raise TemplateError("the conversation has no messages")
        turns = list(messages)
        system = ""
        if turns[0]["role"] == "system":
            system = self._content(turns.pop(0))
        if tools:
            written = write_tools(self._tools, tools)
            system = f"{system}\n\n{written}" if system.strip() else written
        if not system.strip():
            return None, turns
        if self.system is None:
            raise TemplateError(f"message 0: template {self.name} has no place for a system turn or tools")
        return system, turns

    def _content(self, message: Message) -> str:
        content = message["content"]
        return content.strip() if self.trim else content

    def _answer_parts(self, message: Message, after_last_user: bool, final: bool) -> tuple[str, str]:
        """(what ends the generation prompt beside `prompt`, the trained text before the stop token)."""
        before, after = self.answer
        reasoning, content = split_reasoning(message, self.thinking is not None)
        content = content.strip() if self.trim else content
        if reasoning and self.thinking in (None, "closed"):
            raise TemplateError(f"template {self.name} has no place for reasoning_content")
        body = before + content + write_calls(self._tools, message.get("tool_calls"), content) + after
        if not self.thinking or not after_last_user:
            return "", body
        if self.thinking == "answer":
            return "", (THINK_OPEN + reasoning + THINK_CLOSE if final or reasoning else "") + body
        return self._prompt_thinking(), (reasoning + THINK_CLOSE if self.thinking == "prompt" else "") + body

    def _prompt_thinking(self) -> str:
        return {"prompt": THINK_OPEN, "closed": THINK_OPEN + THINK_CLOSE}.get(self.thinking or "", "")

    def _tool_result(self, message: Message) -> str:
        content = self._content(message)
        return self._tools.result.replace(
            "{content}", dumps(content) if "{content}}" in self._tools.result else content
        )

    def to_jinja(self) -> str:
        """The same rendering as a Hugging Face chat template, with {% generation %} around the trained spans."""
        return _Jinja(self).source()


def check_order(turns: Sequence[Message]) -> None:
    """User first, then user and assistant in turns; tool results follow an assistant turn. Raises TemplateError."""
    allowed = {"user": {"assistant"}, "assistant": {"user", "tool"}, "tool": {"tool", "assistant"}}
    expected = {"user"}
    for i, turn in enumerate(turns):
        if turn["role"] not in expected:
            raise TemplateError(f"message {i}: found role {turn['role']!r}, expected {' or '.join(sorted(expected))}")
        expected = allowed[turn["role"]]
    if not turns:
        raise TemplateError("the conversation has no user turn")


def split_reasoning(message: Message, look_inside: bool) -> tuple[str, str]:
    """(reasoning, answer). Families that think keep reasoning out of the history, also when it stands in the content."""
    reasoning, content = message.get("reasoning_content") or "", message["content"]
    if look_inside and not reasoning and "</think>" in content:
        reasoning = content.split("</think>")[0].split("<think>")[-1]
        content = content.split("</think>")[-1]
        content = content.lstrip("\n")
    return reasoning.strip("\n"), content


def dumps(value: object, indent: int | None = None) -> str:
    """JSON as the `tojson` filter of transformers' chat templates writes it."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def write_tools(tool_format: ToolFormat, tools: Sequence[Mapping]) -> str:
    """The text that introduces `tools` to the model."""
    items = [
        tool_format.item.replace("{name}", tool.get("function", tool)["name"]).replace(
            "{json}", dumps(tool, tool_format.indent)
        )
        for tool in tools
    ]
    return tool_format.opening + tool_format.item_separator.join(items) + tool_format.closing


def write_calls(tool_format: ToolFormat, calls: Sequence[Mapping] | None, content: str) -> str:
    """The text of an answer's tool calls, on a new line if the answer has text of its own."""
    if not calls:
        return ""
    written = []
    for call in calls:
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = arguments if isinstance(arguments, str) else dumps(arguments)
        written.append(tool_format.call.replace("{name}", function["name"]).replace("{arguments}", arguments))
    joined = tool_format.calls_opening + tool_format.call_separator.join(written) + tool_format.calls_closing
    return ("\n" if content else "") + joined


class _Jinja:
    """Writes a Template as a Hugging Face chat template.

    All output is in `{{- ... -}}` expressions, so that white space between the tags never reaches the text.
    """

    def __init__(self, template: Template):
        self.template, self.tools = template, template._tools

    def expression(self, text: str) -> str:
        """A string of an entry as a jinja expression: literals and variables joined by ~."""
        variables = {BOS: "(bos_token or '')", EOS: "eos_token", ROUND: "ns.round"}
        return _expression(text, variables)

    def put(self, text: str) -> str:
        return "{{- " + self.expression(text) + " -}}" if text else ""

    def source(self) -> str:
        t = self.template
        trim = " | trim" if t.trim else ""
        lines = [
            "{%- set ns = namespace(system='', turns=messages, last_user=-1, round=" + str(t.first_round) + ") -%}",
            "{%- if messages and messages[0]['role'] == 'system' -%}",
            f"{{%- set ns.system = messages[0]['content']{trim} -%}}{{%- set ns.turns = messages[1:] -%}}",
            "{%- endif -%}",
            *self.tool_lines(),
            "{%- for message in ns.turns -%}",
            "{%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}",
            "{%- endfor -%}",
            self.put(BOS) if t.bos else "",
            "{%- if ns.system | trim -%}",
            self.system_lines(),
            "{%- else -%}" + self.put(t.no_system) + "{%- endif -%}",
            "{%- for message in ns.turns -%}",
            "{%- if message['role'] == 'user' -%}",
            "{%- if not loop.first -%}{%- set ns.round = ns.round + 1 -%}" + self.put(t.next_user) + "{%- endif -%}",
            f"{{{{- message['content']{trim} -}}}}",
            "{%- elif message['role'] == 'tool' -%}",
            *self.result_lines(trim),
            "{%- elif message['role'] == 'assistant' -%}",
            *self.answer_lines(trim),
            "{%- else -%}{{- raise_exception('unexpected role ' ~ message['role']) -}}{%- endif -%}",
            "{%- endfor -%}",
            "{%- if add_generation_prompt -%}" + self.put(t.prompt + t._prompt_thinking()) + "{%- endif -%}",
        ]
        return "\n".join(line for line in lines if line)

    def system_lines(self) -> str:
        if self.template.system is None:
            return "{{- raise_exception('this template has no place for a system turn') -}}"
        before, after = self.template.system
        return self.put(before) + "{{- ns.system -}}" + self.put(after)

    def tool_lines(self) -> list[str]:
        f = self.tools
        dump = "tool | tojson" + (f"(indent={f.indent})" if f.indent else "")
        name = "(tool['function'] if tool['function'] is defined else tool)['name']"
        item = _expression(f.item, {"{name}": name, "{json}": f"({dump})"})
        return [
            "{%- if tools -%}",
            "{%- if ns.system | trim -%}{%- set ns.system = ns.system ~ '\\n\\n' -%}",
            "{%- else -%}{%- set ns.system = '' -%}{%- endif -%}",
            f"{{%- set ns.system = ns.system ~ {_literal(f.opening)} -%}}",
            "{%- for tool in tools -%}",
            f"{{%- set ns.system = ns.system ~ ('' if loop.first else {_literal(f.item_separator)}) ~ {item} -%}}",
            "{%- endfor -%}",
            f"{{%- set ns.system = ns.system ~ {_literal(f.closing)} -%}}" if f.closing else "",
            "{%- endif -%}",
        ]

    def result_lines(self, trim: str) -> list[str]:
        t, f = self.template, self.tools
        opening = t.next_user if t.next_tool is None else t.next_tool
        quoted = " | tojson" if "{content}}" in f.result else ""
        result = _expression(f.result, {"{content}": f"(message['content']{trim}{quoted})"})
        separator = f"{{{{- {_literal(f.result_separator)} -}}}}" if f.result_separator else ""
        return [
            "{%- if not loop.first and ns.turns[loop.index0 - 1]['role'] == 'tool' -%}" + separator,
            "{%- else -%}" + self.put(opening) + "{%- endif -%}",
            f"{{{{- {result} -}}}}",
        ]

    def answer_lines(self, trim: str) -> list[str]:
        t = self.template
        before, after = t.answer
        stop = self.expression(t.stop)
        if t.tool_stop:
            stop = f"({self.expression(t.tool_stop)} if message['tool_calls'] else {stop})"
        return [
            "{%- set answer = namespace(text=message['content'], thought='', calls='') -%}",
            *self.thinking_lines(trim),
            *self.call_lines(),
            self.put(t.prompt),
            *(self.prompt_thinking_lines()),
            "{%- generation -%}",
            "{{- answer.thought -}}" if t.thinking else "",
            self.put(before),
            "{{- answer.text ~ answer.calls -}}",
            self.put(after),
            f"{{{{- {stop} -}}}}",
            "{%- endgeneration -%}",
            "{%- if loop.last -%}" + self.put(t.end) + "{%- endif -%}" if t.end else "",
        ]

    def prompt_thinking_lines(self) -> list[str]:
        opening = self.template._prompt_thinking()
        return ["{%- if loop.index0 > ns.last_user -%}" + self.put(opening) + "{%- endif -%}"] if opening else []

    def thinking_lines(self, trim: str) -> list[str]:
        """Set answer.text and, where it is kept, answer.thought."""
        t = self.template
        lines = []
        if t.thinking:
            lines = [
                "{%- set reasoning = message['reasoning_content'] or '' -%}",
                "{%- if not reasoning and '</think>' in answer.text -%}",
                "{%- set reasoning = answer.text.split('</think>')[0].split('<think>')[-1] -%}",
                "{%- set answer.text = answer.text.split('</think>')[-1].lstrip('\\n') -%}",
                "{%- endif -%}",
                "{%- set reasoning = reasoning.strip('\\n') -%}",
            ]
        if trim:
            lines.append("{%- set answer.text = answer.text | trim -%}")
        if t.thinking in ("answer", "prompt"):
            opening = THINK_OPEN if t.thinking == "answer" else ""
            when = " and (loop.last or reasoning)" if t.thinking == "answer" else ""
            block = (
                f"{_literal(opening)} ~ reasoning ~ {_literal(THINK_CLOSE)}"
                if opening
                else (f"reasoning ~ {_literal(THINK_CLOSE)}")
            )
            lines.append(
                f"{{%- if loop.index0 > ns.last_user{when} -%}}{{%- set answer.thought = {block} -%}}{{%- endif -%}}"
            )
        return lines

    def call_lines(self) -> list[str]:
        f = self.tools
        arguments = "(function['arguments'] if function['arguments'] is string else (function['arguments'] | tojson))"
        call = _expression(f.call, {"{name}": "function['name']", "{arguments}": arguments})
        return [
            "{%- if message['tool_calls'] -%}",
            f"{{%- set answer.calls = ('\\n' if answer.text else '') ~ {_literal(f.calls_opening)} -%}}",
            "{%- for call in message['tool_calls'] -%}",
            "{%- set function = call['function'] if call['function'] is defined else call -%}",
            f"{{%- set answer.calls = answer.calls ~ ('' if loop.first else {_literal(f.call_separator)}) ~ {call} -%}}",
            "{%- endfor -%}",
            f"{{%- set answer.calls = answer.calls ~ {_literal(f.calls_closing)} -%}}",
            "{%- endif -%}",
        ]


def _literal(text: str) -> str:
    """A jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _expression(text: str, variables: Mapping[str, str]) -> str:
    """`text` with its placeholders replaced by jinja expressions, as one expression."""
    parts = [text]
    for placeholder in variables:
        parts = [
            piece for part in parts for piece in ([part] if part in variables else _split_keep(part, placeholder))
        ]
    return " ~ ".join(variables.get(part) or _literal(part) for part in parts if part) or "''"


def _split_keep(text: str, separator: str) -> list[str]:
    pieces = text.split(separator)
    return [piece for pair in zip(pieces, [separator] * len(pieces), strict=True) for piece in pair][:-1]


_TEMPLATES: dict[str, Template] = {}
_ALIASES: dict[str, str] = {}


def register_template(template: Template, *aliases: str) -> Template:
    """Make a template known under its name and aliases."""
    for name in (template.name, *aliases):
        if name in _TEMPLATES or name in _ALIASES:
            raise TemplateError(f"template {name} is registered twice")
    _TEMPLATES[template.name] = template
    _ALIASES.update(dict.fromkeys(aliases, template.name))
    return template


def template_names() -> list[str]:
    """Every name that get_template takes."""
    return sorted([*_TEMPLATES, *_ALIASES])


def get_template(name: str, tool_format: str | None = None) -> Template:
    """The template of that name; `tool_format` replaces the family's way to write tools.

    Raises:
        TemplateError: no such template or tool format; the nearest names are listed.
    """
    template = _TEMPLATES.get(_ALIASES.get(name, name))
    if template is None:
        near = difflib.get_close_matches(name, template_names(), n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(near)}?" if near else "`python template.py` lists them"
        raise TemplateError(f"--template_name {name}: no such template; {hint}")
    if tool_format is None:
        return template
    if tool_format not in TOOL_FORMATS:
        raise TemplateError(f"--tool_format {tool_format}: expected one of {', '.join(TOOL_FORMATS)}")
    return dataclasses.replace(template, tool_format=tool_format)


def with_role_markers(template: Template, markers: Mapping[str, str]) -> Template:
    """The mft template with other role markers: {"system": ..., "user": ..., "assistant": ...}, each before its content."""
    unknown = set(markers) - {"system", "user", "assistant"}
    if unknown or template.name != "mft":
        what = (
            f"unknown role {', '.join(sorted(unknown))}"
            if unknown
            else f"template {template.name} has no role markers"
        )
        raise TemplateError(f"--role_markers: {what}; they are system, user and assistant, for template mft")
    system, user, assistant = (markers.get(role, f"<s>{word}\n") for role, word in _MFT_ROLES)
    return dataclasses.replace(
        template,
        system=(system, "\n" + user),
        no_system=user,
        prompt="\n" + assistant,
        next_user="\n" + user,
        special=(),
    )


_MFT_ROLES = (("system", "system"), ("user", "human"), ("assistant", "bot"))

# The table. The owner's rendering is right; where the owner has none, the comment says what was taken. Every answer ends
# with its stop token, also where the owner's history leaves it out (baichuan, chatglm2 ...): otherwise the model would not
# learn to stop.

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN_SYSTEM = _VICUNA_SYSTEM.replace("curious user", "curious human").replace("the user's", "the human's")
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_CHATML = {
    "system": ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n"),
    "no_system": "<|im_start|>user\n",
    "prompt": "<|im_end|>\n<|im_start|>assistant\n",
    "stop": "<|im_end|>",
    "next_user": "\n<|im_start|>user\n",
    "end": "\n",
    "special": ("<|im_start|>", "<|im_end|>"),
}


def _chatml_with(system: str) -> str:
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


# FastChat is the owner. Its documentation shows newlines between turns, its code writes blanks.
register_template(
    Template(
        "vicuna",
        system=("", " USER: "),
        no_system=f"{_VICUNA_SYSTEM} USER: ",
        prompt=" ASSISTANT:",
        answer=(" ", ""),
        stop="</s>",
        next_user="USER: ",
    )
)
# Stanford defines one turn only; rounds are joined as the majority of tools does.
register_template(
    Template(
        "alpaca",
        system=("", "\n\n### Instruction:\n"),
        no_system=f"{_ALPACA_SYSTEM}\n\n### Instruction:\n",
        prompt="\n\n### Response:\n",
        stop=EOS,
        next_user="\n\n### Instruction:\n",
    )
)
for _name, _user, _assistant in (
    ("baichuan", "<reserved_102>", "<reserved_103>"),
    ("baichuan2", "<reserved_106>", "<reserved_107>"),
):
    register_template(
        Template(
            _name,
            system=("", _user),
            no_system=_user,
            prompt=_assistant,
            stop="</s>",
            next_user=_user,
            special=(_user, _assistant),
        )
    )
# modeling_chatglm.py numbers from 0, chatglm2's build_prompt from 1.
register_template(
    Template(
        "chatglm",
        system=("", f"\n[Round {ROUND}]\n问："),
        no_system=f"[Round {ROUND}]\n问：",
        prompt="\n答：",
        stop="<eop>",
        next_user=f"\n[Round {ROUND}]\n问：",
        end="\n",
        first_round=0,
    )
)
register_template(
    Template(
        "chatglm2",
        system=("", f"\n\n[Round {ROUND}]\n\n问："),
        no_system=f"[Round {ROUND}]\n\n问：",
        prompt="\n\n答：",
        stop="</s>",
        next_user=f"\n\n[Round {ROUND}]\n\n问：",
        end="\n\n",
    )
)
# The stop token is the role token of the next turn. chatglm3's prompt ends without the newline, as in its PROMPT.md.
register_template(
    Template(
        "chatglm3",
        system=("<|system|>\n", "<|user|>\n"),
        no_system="<|user|>\n",
        prompt="<|assistant|>",
        answer=("\n", ""),
        stop="<|user|>",
        other_stops=("</s>",),
        next_user="\n",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        tool_format="glm4",
        tool_stop="<|observation|>",
        next_tool="\n",
    )
)
register_template(
    Template(
        "glm4",
        system=("<|system|>\n", "<|user|>\n"),
        no_system="<|user|>\n",
        prompt="<|assistant|>\n",
        stop="<|user|>",
        other_stops=("<|endoftext|>",),
        next_user="\n",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        tool_format="glm4",
        tool_stop="<|observation|>",
        next_tool="\n",
    )
)
# Meta's chat_completion: BOS and EOS around every round, inputs stripped.
_LLAMA2 = {
    "system": ("[INST] <<SYS>>\n", "\n<</SYS>>\n\n"),
    "prompt": " [/INST]",
    "answer": (" ", " "),
    "stop": "</s>",
    "next_user": f"{BOS}[INST] ",
}
register_template(Template("llama2", no_system="[INST] ", trim=True, **_LLAMA2), "llama-2")
register_template(  # FastChat's chinese-alpaca2
    Template(
        "llama2-zh",
        no_system=(
            "[INST] <<SYS>>\nYou are a helpful assistant. 你是一个乐于助人的助手。"
            "请你提供专业、有逻辑、内容真实、有价值的详细回复。\n<</SYS>>\n\n"
        ),
        **_LLAMA2,
    ),
    "llama-2-zh",
)
_LLAMA3_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
register_template(
    Template(
        "llama3",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", f"<|eot_id|>{_LLAMA3_USER}"),
        no_system=_LLAMA3_USER,
        prompt="<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        stop="<|eot_id|>",
        next_user=_LLAMA3_USER,
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        trim=True,
        tool_format="llama3",
        next_tool="<|start_header_id|>ipython<|end_header_id|>\n\n",
    ),
    "llama-3",
)
# The owner's v1 form, system text in the first user turn; v2/v3 and tekken differ by blanks and have control tokens.
register_template(
    Template(
        "mistral",
        system=(" [INST] ", "\n\n"),
        no_system="[INST] ",
        prompt=" [/INST]",
        answer=(" ", ""),
        stop="</s>",
        next_user="[INST] ",
    ),
    "mistral-v1",
)
_MISTRAL_SPECIAL = (
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)
register_template(
    Template(
        "mistral-v3",
        system=("[INST] ", "\n\n"),
        no_system="[INST] ",
        prompt="[/INST]",
        answer=(" ", ""),
        stop="</s>",
        next_user="[INST] ",
        special=_MISTRAL_SPECIAL,
        tool_format="mistral",
        next_tool="",
    ),
    "mistral-v2",
)
register_template(
    Template(
        "mistral-tekken",
        system=("[INST]", "\n\n"),
        no_system="[INST]",
        prompt="[/INST]",
        stop="</s>",
        next_user="[INST]",
        special=_MISTRAL_SPECIAL,
        tool_format="mistral",
        next_tool="",
    )
)
# OpenHermes: no default system text.
register_template(Template("chatml", other_stops=("</s>",), **_CHATML))
# Qwen2.5 names itself; Qwen1, 1.5 and 2 have the shorter text.
_QWEN = {**_CHATML, "bos": False, "tool_format": "qwen"}
register_template(
    Template(
        "qwen",
        **{**_QWEN, "no_system": _chatml_with("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")},
    ),
    "qwen2.5",
)
register_template(Template("qwen2", **{**_QWEN, "no_system": _chatml_with("You are a helpful assistant.")}), "qwen1.5")
register_template(Template("qwen3", thinking="answer", **_QWEN))
register_template(Template("qwen3_nothink", **_QWEN))
register_template(Template("qwen3_5", thinking="prompt", trim=True, **_QWEN))
register_template(Template("qwen3_5_nothink", thinking="closed", trim=True, **_QWEN))
_DEEPSEEK_STOP = "<｜end▁of▁sentence｜>"
register_template(
    Template(
        "deepseek",
        system=("", "\n\nUser: "),
        no_system="User: ",
        prompt="\n\nAssistant:",
        answer=(" ", ""),
        stop=_DEEPSEEK_STOP,
        next_user="User: ",
    )
)
for _name in ("deepseek3", "deepseek_r1"):
    register_template(
        Template(
            _name,
            system=("", "<｜User｜>"),
            no_system="<｜User｜>",
            prompt="<｜Assistant｜>",
            stop=_DEEPSEEK_STOP,
            next_user="<｜User｜>",
            special=("<｜User｜>", "<｜Assistant｜>"),
            thinking="prompt",
        )
    )
register_template(
    Template(
        "deepseekcoder",
        system=("", "### Instruction:\n"),
        no_system=(
            "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and "
            "you only answer questions related to computer science. For politically sensitive questions, security and "
            "privacy issues, and other non-computer science questions, you will refuse to answer\n### Instruction:\n"
        ),
        prompt="\n### Response:\n",
        answer=("", "\n"),
        stop="<|EOT|>",
        other_stops=(_DEEPSEEK_STOP,),
        next_user="\n### Instruction:\n",
        end="\n",
    )
)
_GEMMA = {
    "no_system": "<start_of_turn>user\n",
    "prompt": "<end_of_turn>\n<start_of_turn>model\n",
    "stop": "<end_of_turn>",
    "next_user": "\n<start_of_turn>user\n",
    "end": "\n",
    "special": ("<start_of_turn>", "<end_of_turn>"),
    "trim": True,
}
register_template(Template("gemma", system=None, **_GEMMA), "gemma2")  # the owner's template raises on a system turn
register_template(Template("gemma3", system=("<start_of_turn>user\n", "\n\n"), **_GEMMA))
# A training text ends with <|endoftext|>.
register_template(
    Template(
        "phi3",
        system=("<|system|>\n", "<|end|>\n<|user|>\n"),
        no_system="<|user|>\n",
        prompt="<|end|>\n<|assistant|>\n",
        stop="<|end|>",
        next_user="\n<|user|>\n",
        end="\n<|endoftext|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
    )
)
# FastChat, after Yi-34B-Chat's tokenizer_config: system text without a header.
register_template(Template("yi", **{**_CHATML, "system": ("", "<|im_end|>\n<|im_start|>user\n")}))
register_template(
    Template(
        "zephyr",
        system=("<|system|>\n", "</s>\n<|user|>\n"),
        no_system="<|user|>\n",
        prompt="</s>\n<|assistant|>\n",
        stop="</s>",
        next_user="\n<|user|>\n",
        end="\n",
    )
)
register_template(
    Template(
        "xverse",
        system=("", "Human: "),
        no_system="Human: ",
        prompt="\n\nAssistant: ",
        stop="<|endoftext|>",
        next_user="Human: ",
    )
)
# FastChat has four layouts for the Aquila models; this one is AquilaChat2-*-16K's.
register_template(
    Template(
        "aquila",
        system=("", "###Human: "),
        no_system=f"{_HUMAN_SYSTEM}###Human: ",
        prompt="###Assistant:",
        answer=(" ", ""),
        stop="</s>",
        other_stops=("###",),
        next_user="Human: ",
    )
)
# internlm-chat-7b; later versions dropped the <s> of each round, then <eoh>.
register_template(
    Template(
        "intern",
        system=("", "<s><|User|>:"),
        no_system=(
            "A chat between a curious <|User|> and an <|Bot|>. The <|Bot|> gives helpful, detailed, and polite answers to "
            "the <|User|>'s questions.\n\n<s><|User|>:"
        ),
        prompt="<eoh>\n<|Bot|>:",
        stop="<eoa>",
        other_stops=("</s>",),
        next_user="\n<s><|User|>:",
        end="\n",
        special=("<s>", "<eoh>", "<eoa>"),
    )
)
# No owner's form in public; ms-swift and LLaMA-Factory agree.
register_template(
    Template(
        "intern2",
        other_stops=("</s>",),
        **{
            **_CHATML,
            "no_system": _chatml_with(
                "You are an AI assistant whose name is InternLM (书生·浦语).\n"
                "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
                "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
                "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such "
                "as English and 中文."
            ),
        },
    )
)
register_template(
    Template(
        "openchat",
        system=("", "<|end_of_turn|>GPT4 Correct User: "),
        no_system="GPT4 Correct User: ",
        prompt="<|end_of_turn|>GPT4 Correct Assistant:",
        answer=(" ", ""),
        stop="<|end_of_turn|>",
        next_user="GPT4 Correct User: ",
        special=("<|end_of_turn|>",),
    )
)
# bigcode's dialogues.py: the system turn is always there, even empty.
register_template(
    Template(
        "starchat",
        system=("<|system|>\n", "<|end|>\n<|user|>\n"),
        no_system="<|system|>\n<|end|>\n<|user|>\n",
        prompt="<|end|>\n<|assistant|>",
        answer=("\n", ""),
        stop="<|end|>",
        other_stops=("<|endoftext|>",),
        next_user="\n<|user|>\n",
        end="\n",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    )
)
# No owner's form; FastChat's, with which most agree piece by piece.
register_template(
    Template(
        "falcon",
        system=("", "User: "),
        no_system="User: ",
        prompt="\n\nAssistant:",
        answer=(" ", ""),
        stop="<|endoftext|>",
        next_user="\n\nUser: ",
        end="\n\n",
        bos=False,
    )
)
# MFTCoder's code: a newline after every content, EOS after the answer's, then a newline that is not trained.
register_template(
    Template(
        "mft",
        system=("<s>system\n", "\n<s>human\n"),
        no_system="<s>human\n",
        prompt="\n<s>bot\n",
        answer=("", "\n"),
        stop=EOS,
        next_user="\n<s>human\n",
        end="\n",
        bos=False,
    )
)
# No owner's form; MedicalGPT's, whose rounds ms-swift shares.
register_template(
    Template(
        "ziya",
        system=("", "\n<human>:"),
        no_system="<human>:",
        prompt="\n<bot>:",
        stop="</s>",
        next_user="\n<human>:",
        special=("<human>", "<bot>"),
    )
)
# No owner's form; FastChat's entry was the model's authors'.
register_template(
    Template(
        "phoenix",
        system=("", "Human: <s>"),
        no_system=f"{_HUMAN_SYSTEM}\n\nHuman: <s>",
        prompt="</s>Assistant: <s>",
        stop="</s>",
        next_user="Human: <s>",
        special=("<s>", "</s>"),
    )
)
# One public reference each (MedicalGPT).
register_template(
    Template(
        "linly",
        system=("", "\nUser: "),
        no_system="User: ",
        prompt="\nBot: ",
        stop=EOS,
        next_user="\nUser: ",
    )
)
register_template(
    Template(
        "belle",
        system=("", "\n\nHuman: "),
        no_system="Human: ",
        prompt="\n\nBelle: ",
        stop=EOS,
        next_user="\n\nHuman: ",
    )
)
# The owner's template has no system turn; plain text in front, as ms-swift has it.
register_template(
    Template(
        "orion",
        system=("", "Human: "),
        no_system="Human: ",
        prompt="\n\nAssistant: </s>",
        stop="</s>",
        next_user="Human: ",
    )
)
_COHERE = "<|START_OF_TURN_TOKEN|>"
register_template(
    Template(
        "cohere",
        system=(f"{_COHERE}<|SYSTEM_TOKEN|>", f"<|END_OF_TURN_TOKEN|>{_COHERE}<|USER_TOKEN|>"),
        no_system=f"{_COHERE}<|USER_TOKEN|>",
        prompt=f"<|END_OF_TURN_TOKEN|>{_COHERE}<|CHATBOT_TOKEN|>",
        stop="<|END_OF_TURN_TOKEN|>",
        next_user=f"{_COHERE}<|USER_TOKEN|>",
        special=(_COHERE, "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        trim=True,
    )
)
# Query and answer, nothing else, for base models.
register_template(Template("vanilla", system=("", ""), no_system="", prompt="", stop=EOS, next_user=""), "base")
# LLaMA-Factory's layout of this name (ms-swift's is another one).
register_template(
    Template(
        "default",
        system=("System: ", f"{EOS}\nHuman: "),
        no_system="Human: ",
        prompt=f"{EOS}\nAssistant:",
        stop=EOS,
        next_user="\nHuman: ",
        end="\n",
    )
)


def show(name: str) -> str:
    """A sample conversation under a template, trained characters between the marks ⟦ and ⟧."""
    template = get_template(name)
    messages = [
        {"role": "user", "content": "Which organ pumps blood?"},
        {"role": "assistant", "content": "The heart."},
        {"role": "user", "content": "谢谢！"},
        {"role": "assistant", "content": "不客气。"},
    ]
    if template.system is not None:
        messages.insert(0, {"role": "system", "content": "You answer in one sentence."})
    rendered = template.render(messages, bos_token="<BOS>", eos_token="<EOS>")
    text = rendered.text
    for start, end in reversed(rendered.spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="List the chat templates, or show one.", allow_abbrev=False)
    parser.add_argument("name", nargs="?", help="template to show")
    name = parser.parse_args(argv).name
    try:
        print(show(name) if name else "\n".join(template_names()))
    except TemplateError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
