"""The tokenizer's own chat template: each assistant turn as inference feeds and finishes it.

A template may render an answer otherwise once other turns follow it: reasoning is dropped from the history, an empty
think block or another stop token is written at the end of the text only, tools move to the last question. So every
prefix of a conversation is rendered by itself. Turns whose text is still there when the conversation goes on share a
row; each of the others becomes a row of its own.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from functools import cached_property
from os.path import commonprefix

from stagewise.errors import InputError
from template import Rendered, TemplateError, split_reasoning

Messages = list[dict]

_NAME_ONE = "name a template with --template_name (`python template.py` lists them)"

# The tags between which models reason. A generation prompt may open a block, or hold an empty one.
_THINK = {
    "<think>": "</think>", "<thinking>": "</thinking>", "<thought>": "</thought>", "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]", "<|START_THINKING|>": "<|END_THINKING|>",
}  # fmt: skip
_OPENER = "|".join(map(re.escape, _THINK))
_CLOSER = "|".join(map(re.escape, _THINK.values()))
_PROMPT_END = re.compile(rf"(?:(?:(?:{_OPENER})\s*)?(?P<closer>{_CLOSER})|(?P<open>{_OPENER}))?\s*\Z")
_BLOCK = re.compile(rf"\s*(?:(?P<opener>{_OPENER})\s*)?(?P<closer>{_CLOSER})?\n*")

# Contents that are looked for in renderings of conversations made up for it.
_QUESTION, _REASON, _ANSWER, _VALUE, _RESULT = (f"Probe{kind}" for kind in ("Ask", "Why", "Say", "Arg", "Out"))
_TOOL = "probe_tool"
_ASKED = {"role": "user", "content": _QUESTION}
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "probe0001", "type": "function", "function": {"name": _TOOL, "arguments": {"x": _VALUE}}}],
}
_ANSWERED_CALL = {"role": "tool", "tool_call_id": "probe0001", "name": _TOOL, "content": _RESULT}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": _TOOL,
            "description": "A probe",
            "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "A text"}}},
        },
    }
]


# What strftime knows, and the ways of writing numbers without zeros: of the C libraries of Linux, of Windows.
_DIRECTIVES = "aAbBcdDeFGHIjmMpRSTuUVwWxXyYzZ"
_FLAGS = ("#",) if sys.platform == "win32" else ("-",)


def special_tokens(tokenizer) -> tuple[str, ...]:
    """The texts that the tokenizer takes for a special token wherever they stand; its template writes some of them."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(dict.fromkeys((*tokenizer.all_special_tokens, *added)))


@dataclass(frozen=True)
class _Closing:
    """How a turn ends.

    stop: the last trained token.
    opener: where the template writes no stop token behind the last turn, but begins the next turn with a token that
        stops generation: the text up to and with that token, which is written in place of `rest`.
    """

    stop: str
    opener: str = ""
    rest: str = ""


class TokenizerRenderer:
    """The tokenizer's own chat template.

    Args:
        day: what the template takes for today; None: the day of the construction.

    Raises:
        InputError: there is none, or it cannot render a question and an answer.
    """

    def __init__(self, tokenizer, day: date | None = None):
        if not tokenizer.chat_template:
            raise InputError(
                f"--template_name: not given, and the tokenizer has no chat template of its own; {_NAME_ONE}"
            )
        self.tokenizer = tokenizer
        self.control_tokens = special_tokens(tokenizer)
        self.eos: str | None = None  # the tokenizer has the EOS that its owner gave it
        self._specials = re.compile("|".join(map(re.escape, sorted(self.control_tokens, key=len)[::-1])))
        shipped = [tokenizer.get_chat_template(None, tools) for tools in (None, _TOOLS)]
        day = day or date.today()
        self._templates = [_on_day(text, day) for text in shipped]  # without and with tools
        self.day = day.isoformat() if self._templates != shipped else None
        self._changes: list[Callable[[dict], dict]] = []  # of messages, to what the template reads
        self._reasoned = ""  # what it writes between reasoning and answer
        try:
            self._probe()
        except TemplateError as error:
            raise InputError(f"{error}; {_NAME_ONE}") from error

    def _probe(self) -> None:
        """Learn from made-up conversations how turns end and where reasoning stands."""
        answered = [_ASKED, {"role": "assistant", "content": _ANSWER}]
        self._learn_contents(answered)
        prompt, text = self._text([_ASKED], None, True), self._text(answered, None, False)
        self._closing = None
        self._closing = self._find_closing(text, self._text([*answered, _ASKED], None, False), _ANSWER)
        stops = [closing.stop for closing in (self._closing, self._call_closing) if closing]
        self.stop_tokens = tuple(dict.fromkeys([*stops, *filter(None, [self.tokenizer.eos_token])]))
        # what is rendered is in the key, too
        self.fingerprint = json.dumps([*self._templates, self.tokenizer.special_tokens_map, prompt, text])
        ending = _PROMPT_END.search(prompt)
        self.opens_think = bool(ending and ending["open"])
        self._learn_reasoning()

    def _learn_contents(self, answered: Messages) -> None:
        """Templates of models that see read contents as lists of parts, and some of those nothing else."""
        try:
            if _ANSWER in self._text(answered, None, False):
                return
        except TemplateError:
            self._changes = [_with_parts]
            if _ANSWER in self._try(answered):
                return
            self._changes = []
            raise
        self._changes = [_with_parts]
        if _ANSWER not in self._try(answered):
            raise TemplateError("the tokenizer's chat template leaves answers out")

    def _learn_reasoning(self) -> None:
        """Where the template reads reasoning, beside the content or in it, and what it writes behind it."""
        reasoned = {"role": "assistant", "reasoning_content": _REASON, "content": _ANSWER}
        beside, inline = (self._try([_ASKED, message]) for message in (reasoned, _with_inline_reasoning(reasoned)))
        if _REASON in beside and inline != beside:
            self._changes.insert(0, _with_own_reasoning)
        elif _REASON in inline and _REASON not in beside and any("</think>" in text for text in self._templates):
            self._changes.insert(0, _with_inline_reasoning)
        between = re.search(f"{_REASON}(.*?){_ANSWER}", self._try([_ASKED, reasoned]), re.DOTALL)
        self._reasoned = between[1] if between else ""

    def render(self, messages: Messages, tools: list | None = None, add_generation_prompt: bool = False) -> Rendered:
        """The prompt that waits for an answer; or the conversation with its last answer as the model gives it, and the
        spans of those earlier answers that are still as they were given.

        Raises:
            TemplateError: the template refuses the conversation, has no place for what it holds, or does not begin an
                answer where its generation prompt ends.
        """
        if add_generation_prompt:
            return Rendered(self._text(messages, tools, True), ())
        return self.rows(messages, tools)[-1]

    def rows(self, messages: Messages, tools: list | None = None, last: bool = False) -> list[Rendered]:
        """As few texts as hold every assistant turn (or only the last) as inference would feed and finish it, in the
        order of their last turns. Each turn has a span in one of them.

        Raises:
            TemplateError: as `render`.
        """
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        rows = [] if answers[-1:] == [len(messages) - 1] else [Rendered(self._text(messages, tools, False), ())]
        for index in reversed(answers[-1:] if last else answers):
            turn = self._turn(messages, index, tools)
            text = turn.text[: turn.spans[0][1]]
            for at, row in enumerate(rows):
                if row.text.startswith(text):
                    rows[at] = Rendered(row.text, turn.spans + row.spans, turn.turns + row.turns)
                    break
            else:
                rows.append(turn)
        return rows[::-1]

    # ---- one turn

    def _turn(self, messages: Messages, index: int, tools: list | None) -> Rendered:
        """The conversation up to and with one assistant turn, which is the only span."""
        message, where = messages[index], f"messages[{index}]"
        prompt = self._text(messages[:index], tools, True)
        text = self._continued(prompt, self._text(messages[: index + 1], tools, False), message, where)
        calls = message.get("tool_calls")
        closing = (self._call_closing if calls else None) or self._closing
        _check_calls(message, text[len(prompt) :], where)
        if closing is None:
            raise TemplateError(f"the tokenizer's chat template writes no stop token after an answer; {_NAME_ONE}")
        if closing.opener:
            text = text.removesuffix(closing.rest) + closing.opener
        at = text.rfind(closing.stop, len(prompt))
        end = at + len(closing.stop)
        if at < 0:  # a call may end otherwise than the one that was made up
            found = list(self._specials.finditer(text, len(prompt)))
            if not found:
                raise TemplateError(
                    f"{where}: the tokenizer's chat template writes no stop token after it; {_NAME_ONE}"
                )
            at, end = found[-1].span()
        if (message.get("content") or "").strip() and not text[len(prompt) : at].strip():
            raise TemplateError(f"{where}: the tokenizer's chat template leaves the answer out; {_NAME_ONE}")
        if any(each["role"] == "tool" for each in messages[:index]) and not self._renders_results:
            raise TemplateError(
                f"{where}: the tokenizer's chat template has no place for tool results, which the answer goes by; "
                f"{_NAME_ONE} and --tool_format"
            )
        return Rendered(text, ((len(prompt), end),), (index,))

    def _continued(self, prompt: str, text: str, message: dict, where: str) -> str:
        """`text`, which ends with the turn of `message`, as the model must go on from `prompt`.

        Where the template begins the turn otherwise than its generation prompt does: the prompt opens a think block
        and the turn has none (R1's history), or it has an empty one, or there are blanks too few.
        """
        if text.startswith(prompt):
            return text
        ending = _PROMPT_END.search(prompt)
        assert ending is not None  # it matches nothing at the end
        header = prompt[: ending.start()].rstrip()
        if not text.startswith(header):
            same = len(re.sub(r"<[^<>\s]*\Z", "", commonprefix([prompt, text])))  # whole tokens
            raise TemplateError(
                f"{where}: the tokenizer's chat template ends its generation prompt with {prompt[same:]!r} where it "
                f"begins the answer with {text[same : same + 40]!r}; {_NAME_ONE}"
            )
        blanks = prompt[len(header) : ending.start()] or prompt[len(header) :]
        answer = text[len(header) :]
        answer = answer[len(commonprefix([answer, blanks])) :]
        block = _BLOCK.match(answer)
        assert block is not None  # as above
        inner = answer[block.end() :]
        if ending["closer"] and block["opener"] and not block["closer"]:
            raise TemplateError(
                f"{where}: has reasoning, and the generation prompt of the tokenizer's chat template closes the think "
                f"block ({prompt[ending.start() :].strip()!r}), so that no answer begins where the prompt ends; take "
                "the reasoning out of the rows, or name a template that has a place for it with --template_name"
            )
        if not ending["open"]:
            return prompt + (inner if ending["closer"] and block["closer"] else answer)
        if block["opener"] and not block["closer"]:  # what was reasoned is in the text
            return prompt + inner
        reasoning, _ = split_reasoning(message, message.get("content") or "")
        return (
            prompt
            + reasoning.strip()
            + (self._reasoned or _after_reasoning(prompt, ending["open"]))
            + (inner if block["closer"] else answer.lstrip("\n"))
        )

    # ---- what the template does

    def _text(self, messages: Sequence[dict], tools: list | None, add_generation_prompt: bool) -> str:
        for change in self._changes:
            messages = [change(message) for message in messages]
        if self._reads_json and any(message.get("tool_calls") for message in messages):
            messages = [_with_json_arguments(message) for message in messages]
        return self._apply(messages, tools, add_generation_prompt)

    def _apply(self, messages: Sequence[dict], tools: list | None, add_generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._templates[tools is not None],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except Exception as error:  # jinja2 errors, raise_exception() of the template
            raise TemplateError(f"the tokenizer's chat template refuses the conversation: {error}") from error

    def _try(self, messages: Sequence[dict], tools: list | None = None) -> str:
        """The text, or nothing where the template refuses it."""
        try:
            return self._text(messages, tools, False)
        except TemplateError:
            return ""

    def _find_closing(self, last: str, followed: str, marker: str, inside: bool = False) -> _Closing | None:
        """How a turn ends that holds `marker`, from a text that ends with it and one that goes on.

        Args:
            inside: what follows the marker may hold other special tokens that belong to the turn (those of a call).
        """
        head, _, tail = last.rpartition(marker)
        following = followed.rpartition(marker)[2]
        for candidate in (commonprefix([tail, following]), tail):
            found = list(self._specials.finditer(candidate))
            if not found:
                continue
            tokens = [each[0] for each in found]
            known = [self.tokenizer.eos_token]
            if inside:
                known += [self._closing.stop if self._closing else None, tokens[-1]]
            for stop in known:
                if stop in tokens:
                    return _Closing(stop)
            # several closing tokens side by side; one that was in the text before may open the next turn
            count = 1
            while count < len(found) and found[count].start() == found[count - 1].end() and tokens[count] not in head:
                count += 1
            return _Closing(tokens[count - 1])
        opener = self._specials.search(following)
        if opener is None:
            return None
        same = len(commonprefix([tail, following[: opener.start()]]))
        return _Closing(opener[0], following[same : opener.end()], tail[same:])

    @cached_property
    def _reads_json(self) -> bool:
        """Whether the template wants the arguments of a call as JSON text, as OpenAI's API gives them."""
        try:
            return _VALUE not in self._apply([_ASKED, _CALL], _TOOLS, False)
        except TemplateError:
            return True

    @cached_property
    def _call_closing(self) -> _Closing | None:
        """How a turn with calls ends; None where the template tells nothing of calls, or refuses the made-up one."""
        last, followed = self._try([_ASKED, _CALL], _TOOLS), self._try([_ASKED, _CALL, _ANSWERED_CALL], _TOOLS)
        return self._find_closing(last, followed, _VALUE, inside=True) if _VALUE in last and followed else None

    @cached_property
    def describes_tools(self) -> bool:
        """Whether the tools that a conversation may call are in its text."""
        return _TOOL in self._try([_ASKED], _TOOLS)

    @cached_property
    def _renders_results(self) -> bool:
        """False where the template leaves results out, and not where it refuses the made-up one for another reason."""
        found = self._try([_ASKED, _CALL, _ANSWERED_CALL], _TOOLS)
        return not found or _RESULT in found


def _check_calls(message: dict, answer: str, where: str) -> None:
    """Raise TemplateError where the template leaves out the calls that are to be learnt."""
    for call in message.get("tool_calls") or []:
        name = (call.get("function") or call).get("name") or ""
        if name not in answer:
            raise TemplateError(
                f"{where}: the tokenizer's chat template has no place for tool calls (that of {name!r} is not in its "
                f"text); {_NAME_ONE} and --tool_format, or leave these rows out"
            )


def _on_day(template: str, day: date) -> str:
    """The jinja text with a day of its own in place of today, if it asks for that.

    transformers hands templates strftime_now and takes no other function from outside; a macro of that name comes
    before it, however the template calls it. Times are those of midnight.
    """
    if "strftime_now" not in template:
        return template
    midnight = datetime.combine(day, time())
    directives = [f"%{flag}{letter}" for flag in ("", *_FLAGS) for letter in _DIRECTIVES]
    steps = [("%%", "\0"), *((each, midnight.strftime(each)) for each in directives), ("\0", "%")]
    filters = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    # the last newline is one that trim_blocks takes off: what follows is at the beginning of a line, as before
    return "{%- macro strftime_now(format) -%}{{ format" + filters + " }}{%- endmacro %}\n" + template


def _after_reasoning(prompt: str, opener: str) -> str:
    """What stands between reasoning and answer, where the template does not show it."""
    return f"\n{_THINK[opener]}\n\n" if prompt.endswith("\n") else _THINK[opener]


def _with_inline_reasoning(message: dict) -> dict:
    reasoning = message.get("reasoning_content")
    if not isinstance(reasoning, str) or not reasoning.strip():
        return message
    content = f"<think>\n{reasoning.strip()}\n</think>\n\n{message.get('content') or ''}"
    return {**message, "reasoning_content": None, "content": content}


def _with_own_reasoning(message: dict) -> dict:
    content = message.get("content") or ""
    if message["role"] != "assistant" or message.get("reasoning_content") or "</think>" not in content:
        return message
    reasoning, content = split_reasoning(message, content)
    return {**message, "reasoning_content": reasoning, "content": content}


def _with_parts(message: dict) -> dict:
    return {**message, "content": [{"type": "text", "text": message.get("content") or ""}]}


def _with_json_arguments(message: dict) -> dict:
    calls = []
    for call in message.get("tool_calls") or []:
        function = call.get("function") or call
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**function, "arguments": text}})
    return {**message, "tool_calls": calls} if calls else message
