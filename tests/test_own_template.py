"""The tokenizer's own chat template: every answer is trained as inference would feed and finish it, or it is refused.

The templates are small ones with the habits of known families; what is expected is worked out by hand.
"""

import copy
import importlib.resources
import json
from datetime import date, datetime

import pytest
from datasets import Dataset

from stagewise.data.audit import audit_conversations
from stagewise.data.own_template import TokenizerRenderer
from stagewise.data.preferences import PreferenceOptions, encode_pairs
from stagewise.data.prompts import PromptOptions, completion_suffix, encode_prompts
from stagewise.data.records import Conversation, PreferencePair, Prompt
from stagewise.data.tokenization import (
    EncodingOptions,
    build_renderer,
    drop_unusable,
    encode_conversations,
    tokenize_conversations,
)
from stagewise.errors import InputError
from template import TemplateError

LONG = EncodingOptions(max_length=10_000)
HEAD = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
REST = (
    "{% elif m.role == 'tool' %}<|im_start|>user\nresult: {{ m.content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}CALL {{ c.function | tojson }}{% endfor %}"
CHATML = HEAD + "<|im_start|>assistant\n{{ m.content }}" + CALLS + "<|im_end|>\n" + REST + PROMPT.replace("%s", "")
# DeepSeek-R1-Distill: the prompt opens a think block, the turn has none.
OPENS = (
    HEAD
    + "<|im_start|>assistant\n{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    + REST
    + PROMPT.replace("%s", "<think>\n")
)
# QwQ: the same, but the last answer keeps its reasoning.
QWQ = OPENS.replace(
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}",
    "{{ m.content if loop.last else m.content.split('</think>')[-1].lstrip('\n') }}",
)
# Nemotron-3: an empty block in front of answers without reasoning, where the prompt opens one.
NEMOTRON = (
    HEAD
    + "<|im_start|>assistant\n{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n"
    + "{% else %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    + REST
    + PROMPT.replace("%s", "<think>\n")
)
# Qwen3: an empty block in front of the last answer alone.
QWEN3 = CHATML.replace(
    "assistant\n{{ m.content }}", "assistant\n{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)
# gpt-oss: another token ends the last answer, and a call ends with a third.
GPT_OSS = CHATML.replace(
    "<|im_end|>\n{% elif m.role == 'tool' %}",
    "{{ '<|call|>' if m.tool_calls else '</s>' if loop.last else '<|im_end|>' }}{% elif m.role == 'tool' %}",
)
# GLM-4: the token that opens the next turn ends the answer.
GLM4 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
    + CALLS
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LINES = CHATML.replace("{{ m.content }}" + CALLS + "<|im_end|>\n", "{{ m.content }}\n")
# Phi-3 and Phi-4-mini: the EOS behind the stop token of the last answer.
PHI = CHATML.replace(
    "{% endfor %}{% if add_gen", "{% endfor %}{% if not add_generation_prompt %}</s>{% endif %}{% if add_gen"
)
# Command-R7B: two tokens close an answer, the second ends generation.
COMMAND = CHATML.replace("{{ m.content }}" + CALLS + "<|im_end|>\n", "{{ m.content }}<|response|></s>")
# Mistral and DeepSeek: a special token opens the calls.
OPENER = CHATML.replace("CALL {{", "<|calls|>{{").replace(
    "{{ c.function | tojson }}", "{{ c.function | tojson }}<|end|>"
)
NO_CALLS = CHATML.replace(CALLS, "")
CLOSED = (
    HEAD
    + "{% set r = m.content.split('</think>')[0].replace('<think>', '').strip() if '</think>' in m.content else '' %}"
    + "<|im_start|>assistant\n<think>\n{{ r }}\n</think>\n\n{{ m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    + REST
    + PROMPT.replace("%s", "<think>\n\n</think>\n\n")
)
_BODY = CHATML.removeprefix("{{ bos_token }}")
DATED = "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n" + _BODY
# The same date by the ways that templates have of writing it: Llama 3.2, SmolLM3, and what a careful author may write.
DATES = {
    "literal": "{{ strftime_now('%d %b %Y') }}",
    "date_string": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}'
        "{%- endif %}{%- endif %}{{ date_string }}"
    ),
    "variable": '{%- set today = strftime_now("%d %b %Y") -%}{{ today }}',
    "format in a variable": "{%- set format = '%d %b' ~ ' %Y' -%}{{ strftime_now(format) }}",
    "keyword": "{%- set format = '%d %b %Y' -%}{{ strftime_now(format=format) }}",
    "quotes": "{{ strftime_now('%d' + \" %b %Y\") }}",
    "function by another name": "{%- set now = strftime_now -%}{{ now('%d %b %Y') }}",
    "macro": "{%- macro today(format) -%}{{ strftime_now(format) }}{%- endmacro -%}{{ today('%d %b %Y') }}",
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(name="weather"):
    function = {"name": name, "arguments": {"city": "Rome"}}
    return assistant("", tool_calls=[{"id": "c1", "type": "function", "function": function}])


ROUNDS = [user("Q1"), assistant("A1"), user("Q2"), assistant("A2"), user("Q3"), assistant("A3")]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "W", "parameters": {"type": "object"}}}]
WEATHER = [user("Q"), call(), {"role": "tool", "tool_call_id": "c1", "content": "sunny"}, assistant("It is sunny.")]
CALL_TEXT = '{"name": "weather", "arguments": {"city": "Rome"}}'
THOUGHT = "<think>\nR\n</think>\n\nA"


@pytest.fixture(scope="module")
def own(tokenizer):
    """own(jinja) is the tiny tokenizer with that template and the special tokens of all of them."""

    def build(jinja: str):
        found = copy.deepcopy(tokenizer)
        special = ["<|call|>", "<|calls|>", "<|end|>", "<|response|>"]
        found.add_tokens([*special, *(f"<|{role}|>" for role in ("user", "assistant", "tool"))], special_tokens=True)
        found.chat_template = jinja
        return found

    return build


def trained(jinja, own, messages, tools=None, **options) -> list[list[tuple[str, str]]]:
    """Of each row, the (text before, trained text) of its spans; the ids say so, and the audit agrees."""
    tokenizer = own(jinja)
    renderer = build_renderer(None, tokenizer)
    rows = renderer.rows(messages, tools, **options)
    found = [[(row.text[:start], row.text[start:end]) for start, end in row.spans] for row in rows]
    encoding = EncodingOptions(10_000, train_on="last" if options.get("last") else "all")
    records = Dataset.from_dict(
        {"record": [Conversation(messages, tools).to_json()], "location": ["f:1"], "dataset": ["f"]}
    )
    encoded = tokenize_conversations(records, renderer, tokenizer, encoding, load_from_cache=False)
    audit_conversations(records, encoded, renderer, tokenizer, encoding)
    labels = ["".join(map(tokenizer.decode, _runs(row["labels"]))) for row in encoded]
    assert labels == ["".join(answer for _, answer in row) for row in found]
    for row in found:
        for before, _ in row:
            turns = sum(message["role"] == "assistant" for message in messages)
            assert any(
                before == renderer.render(messages[:i], tools, add_generation_prompt=True).text
                for i in range(1, len(messages))
            ), (before, turns)
    return found


def _runs(labels):
    runs, current = [], []
    for label in [*labels, -100]:
        if label != -100:
            current.append(label)
        elif current:
            runs.append(current)
            current = []
    return runs


def answers(rows):
    return [[answer for _, answer in row] for row in rows]


def test_turns_that_stay_as_they_were_share_a_row(own):
    assert answers(trained(CHATML, own, ROUNDS)) == [["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"]]
    assert answers(trained(CHATML, own, ROUNDS, last=True)) == [["A3<|im_end|>"]]


def test_a_prompt_that_opens_a_think_block_is_gone_on_from(own):
    for jinja in (OPENS, QWQ):
        for turn in (assistant(THOUGHT), assistant("A", reasoning_content="R")):
            assert answers(trained(jinja, own, [user("Q"), turn])) == [["R\n</think>\n\nA<|im_end|>"]]
    ((before, _),) = trained(OPENS, own, [user("Q"), assistant(THOUGHT)])[0]
    assert before == "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n<think>\n"
    # the template's own words between reasoning and answer
    reasoned = [user("Q"), assistant("A", reasoning_content="R")]
    assert answers(trained(NEMOTRON, own, reasoned)) == [["R\n</think>\nA<|im_end|>"]]


def test_an_answer_without_reasoning_closes_the_block_and_is_counted(own):
    assert answers(trained(OPENS, own, ROUNDS[:2])) == [["\n</think>\n\nA1<|im_end|>"]]
    assert answers(trained(NEMOTRON, own, ROUNDS[:2])) == [["\n</think>\nA1<|im_end|>"]]
    tokenizer = own(OPENS)
    renderer = build_renderer(None, tokenizer)
    (row,) = encode_conversations([Conversation(ROUNDS[:2])], renderer, tokenizer, LONG)
    assert row.remarks == "answers without reasoning close an empty think block"
    (row,) = encode_conversations([Conversation([user("Q"), assistant(THOUGHT)])], renderer, tokenizer, LONG)
    assert row.remarks == ""


def test_each_answer_is_reasoned_for_in_a_row_of_its_own(own):
    messages = [user("Q1"), assistant(THOUGHT), user("Q2"), assistant(THOUGHT.replace("R", "S"))]
    first, second = trained(OPENS, own, messages)
    assert first[0][1] == "R\n</think>\n\nA<|im_end|>"
    assert second[0][1] == "S\n</think>\n\nA<|im_end|>"
    assert "assistant\nA<|im_end|>" in second[0][0], "the history is the template's"


def test_a_call_in_front_of_the_last_answer_is_trained(own):
    rows = trained(QWEN3, own, WEATHER, TOOLS)
    empty = "<think>\n\n</think>\n\n"
    assert answers(rows) == [[f"{empty}CALL {CALL_TEXT}<|im_end|>"], [f"{empty}It is sunny.<|im_end|>"]]
    assert empty not in rows[1][0][0]


def test_every_answer_ends_as_the_last_one_does(own):
    assert answers(trained(GPT_OSS, own, ROUNDS)) == [["A1</s>"], ["A2</s>"], ["A3</s>"]]
    assert answers(trained(GPT_OSS, own, WEATHER, TOOLS)) == [[f"CALL {CALL_TEXT}<|call|>", "It is sunny.</s>"]]


def test_the_token_that_opens_the_next_turn_ends_an_answer_that_has_no_stop(own):
    assert answers(trained(GLM4, own, ROUNDS)) == [["A1<|user|>", "A2<|user|>", "A3<|user|>"]]
    assert answers(trained(GLM4, own, WEATHER, TOOLS)) == [[f"CALL {CALL_TEXT}<|tool|>", "It is sunny.<|user|>"]]
    renderer = build_renderer(None, own(GLM4))
    assert renderer.stop_tokens == ("<|user|>", "<|tool|>", "</s>")
    assert answers(trained(LINES, own, ROUNDS[:4])) == [["A1\n<|im_start|>", "A2\n<|im_start|>"]]


def test_of_two_closing_tokens_the_one_that_ends_generation_is_the_last(own):
    assert answers(trained(PHI, own, ROUNDS)) == [["A1<|im_end|>", "A2<|im_end|>", "A3<|im_end|>"]]
    assert answers(trained(COMMAND, own, ROUNDS[:4])) == [["A1<|response|></s>", "A2<|response|></s>"]]
    doubled = CHATML.replace(CALLS + "<|im_end|>\n", CALLS + "</s><|im_end|>\n")
    assert answers(trained(doubled, own, ROUNDS[:4])) == [["A1</s>", "A2</s>"]]
    # a header that is always written (the first Llama 3) is no second closing token
    headed = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
        "{{ '<|im_start|>assistant\\n' }}"
    )
    assert answers(trained(headed, own, ROUNDS[:2])) == [["A1<|end|>"]]


def test_a_special_token_in_a_call_does_not_end_it(own):
    first, last = answers(trained(OPENER, own, WEATHER, TOOLS))[0]
    assert first == f"<|calls|>{CALL_TEXT}<|end|><|im_end|>"
    assert last == "It is sunny.<|im_end|>"


def test_what_a_template_has_no_place_for_is_refused_with_a_remedy(own):
    refused = build_renderer(None, own(NO_CALLS))
    with pytest.raises(TemplateError, match=r"messages\[1\].* no place for tool calls .*'weather'.*--tool_format"):
        refused.rows(WEATHER, TOOLS)
    with pytest.raises(TemplateError, match=r"messages\[3\].* no place for tool results.*--tool_format"):
        build_renderer(None, own(CHATML.replace("result: {{ m.content }}", ""))).rows(WEATHER, TOOLS)
    plain = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
    with pytest.raises(
        TemplateError, match="writes no stop token after an answer; name a template with --template_name"
    ):
        build_renderer(None, own(plain)).rows(ROUNDS[:2])


def test_reasoning_behind_a_closed_block_is_refused(own):
    renderer = build_renderer(None, own(CLOSED))
    with pytest.raises(
        TemplateError, match=r"messages\[1\]: has reasoning, .*closes the think block.*--template_name"
    ):
        renderer.rows([user("Q"), assistant(THOUGHT)])
    assert answers(trained(CLOSED, own, ROUNDS[:2])) == [["A1<|im_end|>"]]


def test_what_is_left_out_is_counted(own):
    tokenizer = own(CHATML)
    renderer = build_renderer(None, tokenizer)
    chats = [Conversation([user("Q"), assistant("A", reasoning_content="why")]), Conversation(WEATHER, TOOLS)]
    rows = encode_conversations(chats, renderer, tokenizer, LONG)
    assert [row.remarks for row in rows] == ["reasoning is left out", "tool descriptions are left out"]


def test_reasoning_is_given_where_the_template_reads_it(own):
    # beside the content, for a template that would take an inline block for text
    beside = CHATML.replace(
        "{{ m.content }}", "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}{{ m.content }}"
    )
    for turn in (assistant(THOUGHT), assistant("A", reasoning_content="R")):
        assert answers(trained(beside, own, [user("Q"), turn])) == [["[R]A<|im_end|>"]]
    # inline, for one that knows no other place
    inline = CHATML.replace(
        "{{ m.content }}", "{{ m.content if '</think>' in m.content else '<think></think>' ~ m.content }}"
    )
    for turn in (assistant(THOUGHT), assistant("A", reasoning_content="R")):
        assert answers(trained(inline, own, [user("Q"), turn])) == [[f"{THOUGHT}<|im_end|>"]]


def test_contents_in_parts_and_arguments_as_text(own):
    parts = CHATML.replace("m.content", "m.content[0].text")
    assert answers(trained(parts, own, ROUNDS[:2])) == [["A1<|im_end|>"]]
    joined = CHATML.replace("{{ c.function | tojson }}", "{{ c.function.name + c.function.arguments }}")
    assert answers(trained(joined, own, WEATHER, TOOLS))[0][0] == 'CALL weather{"city": "Rome"}<|im_end|>'


def test_a_prompt_that_no_answer_goes_on_from_is_an_error(own):
    other = CHATML.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n", "{% if add_generation_prompt %}<|end|>"
    )
    with pytest.raises(
        TemplateError,
        match=r"messages\[1\]: .* ends its generation prompt with '<\|end\|>' where it begins .*'<\|im_start",
    ):
        build_renderer(None, own(other)).rows(ROUNDS[:2])


# ---- rows and their limits


def test_whole_answers_are_cut_from_conversations_of_several_rows(own):
    tokenizer = own(GPT_OSS)
    renderer = build_renderer(None, tokenizer)
    lengths = [len(r.input_ids) for r in encode_conversations([Conversation(ROUNDS)], renderer, tokenizer, LONG)]
    assert lengths == sorted(set(lengths))
    chats = [Conversation(ROUNDS), Conversation(ROUNDS[:2])]

    def encode(limit, **options):
        return encode_conversations(chats, renderer, tokenizer, EncodingOptions(limit, **options))

    rows = encode(lengths[1])
    assert [(r.conversation, r.messages, len(r.input_ids), r.truncated) for r in rows] == [
        (0, 2, lengths[0], "turns"), (0, 4, lengths[1], "turns"), (1, 2, lengths[0], ""),
    ]  # fmt: skip
    rows = encode(lengths[0] - 1)
    assert [(r.conversation, len(r.input_ids), r.truncated) for r in rows] == [
        (0, lengths[0] - 1, "answer"), (1, lengths[0] - 1, "answer"),
    ]  # fmt: skip
    rows = encode(lengths[1], on_too_long="drop")
    assert [bool(r.dropped) for r in rows] == [False, False, True, False]


def test_rows_know_their_conversation_and_the_audit_names_them(own, capsys):
    from stagewise.data.audit import print_audit

    tokenizer = own(GPT_OSS)
    renderer = build_renderer(None, tokenizer)
    chats = [Conversation(ROUNDS), Conversation(ROUNDS[:2]), Conversation(ROUNDS[:4])]
    records = Dataset.from_dict(
        {"record": [c.to_json() for c in chats], "location": ["f:1", "f:2", "f:3"], "dataset": ["a", "b", "c"]}
    )
    encoded = tokenize_conversations(records, renderer, tokenizer, LONG, load_from_cache=False)
    assert encoded["conversation"][:] == [0, 0, 0, 1, 2, 2]
    assert encoded["location"][:] == ["f:1"] * 3 + ["f:2"] + ["f:3"] * 2
    assert encoded["dataset"][:] == list("aaabcc")
    assert encoded["further"][:] == [False, True, True, False, False, True]
    audit = audit_conversations(records, encoded, renderer, tokenizer, LONG)
    assert audit.checked == 6
    print_audit(audit, encoded, tokenizer, 0)
    assert "3 conversations became 6 rows" in " ".join(capsys.readouterr().out.split())


def test_a_row_that_the_template_refuses_says_why(own):
    tokenizer = own(CLOSED)
    records = Dataset.from_dict(
        {
            "record": [Conversation(m).to_json() for m in (ROUNDS[:2], [user("Q"), assistant(THOUGHT)])],
            "location": ["f:1", "f:2"],
            "dataset": ["f", "f"],
        }
    )
    encoded = tokenize_conversations(records, build_renderer(None, tokenizer), tokenizer, LONG, load_from_cache=False)
    with pytest.raises(InputError, match="f:2: .*closes the think block"):
        drop_unusable(encoded)


# ---- the other stages


def test_pairs_and_prompts_go_on_from_an_opened_block(own):
    tokenizer = own(OPENS)
    renderer = build_renderer(None, tokenizer)
    chosen, rejected = [assistant(THOUGHT)], [assistant(THOUGHT.replace("A", "B"))]
    (pair,) = encode_pairs(
        [PreferencePair([user("Q")], chosen, rejected)], renderer, tokenizer, PreferenceOptions(10_000)
    )
    (prompt,) = encode_prompts([Prompt([user("Q")])], renderer, tokenizer, PromptOptions(10_000))
    assert pair.prompt_ids == prompt.input_ids
    assert tokenizer.decode(pair.chosen_ids) == "R\n</think>\n\nA<|im_end|>\n"
    assert tokenizer.decode(pair.rejected_ids) == "R\n</think>\n\nB<|im_end|>\n"
    assert tokenizer.decode(completion_suffix(renderer, tokenizer)) == "\n"


# ---- the date


def test_the_day_is_in_the_key_and_can_be_held(own):
    tokenizer = own(DATED)
    eve, day = (TokenizerRenderer(tokenizer, date(2030, 12, 31)), TokenizerRenderer(tokenizer, date(2031, 1, 1)))
    assert "Today is 31 Dec 2030." in eve.render(ROUNDS[:2]).text
    assert "Today is 01 Jan 2031." in day.render(ROUNDS[:2]).text
    assert eve.fingerprint != day.fingerprint
    assert (eve.day, build_renderer(None, own(CHATML)).day) == ("2030-12-31", None)
    again = build_renderer(None, tokenizer, eve.day)
    assert again.fingerprint == eve.fingerprint
    assert again.render(ROUNDS).text == eve.render(ROUNDS).text


@pytest.mark.parametrize("way", DATES)
def test_the_day_is_held_however_a_template_comes_by_it(own, way):
    tokenizer = own("{{ bos_token }}Today:" + DATES[way] + ".\n" + _BODY)
    eve, day = (TokenizerRenderer(tokenizer, date(2030, 12, 31)), TokenizerRenderer(tokenizer, date(2031, 1, 1)))
    assert eve.render(ROUNDS[:2]).text.startswith("<s>Today:31 Dec 2030.\n<|im_start|>")
    assert day.render(ROUNDS[:2]).text.startswith("<s>Today:01 Jan 2031.\n<|im_start|>")
    assert (eve.day, day.day) == ("2030-12-31", "2031-01-01")
    assert eve.fingerprint != day.fingerprint


@pytest.mark.parametrize(
    "written",
    ["%d %B %Y", "%A, %-d %B %Y", "%y%m%d", "100%% of %H:%M", "%%d is %d", "%I:%M %p", "no directive"],
)
def test_a_held_day_is_written_as_strftime_writes_it(own, written):
    held = TokenizerRenderer(own("\n  {{ strftime_now('" + written + "') }}\n" + _BODY), date(2030, 3, 5))
    plain = own("\n  {{ '" + datetime(2030, 3, 5).strftime(written) + "' }}\n" + _BODY)
    assert held.render(ROUNDS).text == TokenizerRenderer(plain).render(ROUNDS).text


def test_a_date_that_only_conversations_with_tools_have_is_in_the_key(own):
    tokenizer = own(
        "{{ bos_token }}{% if tools %}{%- set d = strftime_now('%d %b %Y') -%}{{ d }}\n{% endif %}" + _BODY
    )
    eve, day = (TokenizerRenderer(tokenizer, date(2030, 12, 31)), TokenizerRenderer(tokenizer, date(2031, 1, 1)))
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    assert eve.render(ROUNDS[:2], tools=[tool]).text.startswith("<s>31 Dec 2030\n")
    assert eve.fingerprint != day.fingerprint


def test_a_run_goes_on_with_the_day_on_which_it_was_begun(tmp_path):
    from stagewise.run.lineage import day_of_run, write_stage

    write_stage(tmp_path, day="2030-12-31")
    assert day_of_run(str(tmp_path)) == "2030-12-31"
    assert day_of_run(None) == date.today().isoformat()


# ---- templates that models ship, as far as TRL keeps copies of them

SHIPPED = {
    "deepseek_r1_distill": 3, "gptoss": 3, "qwen3": 3, "qwen3_5_think": 3, "qwen3_5_nothink": 3, "phi3": 1,
    "phi3_5": 1, "llama3_1": 1, "llama3_2": 1, "glm4moe": 1, "qwen2_5": 1, "gemma3": 1, "cohere2": 1, "smolvlm": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_all_answers_of_shipped_templates_are_trained(name, own):
    path = importlib.resources.files("trl").joinpath("chat_templates", f"{name}.jinja")
    if not path.is_file():
        pytest.skip(f"this TRL has no {path.name}")
    jinja = path.read_text(encoding="utf-8")
    tokenizer = own(jinja)
    tokenizer.add_tokens(
        ["<|return|>", "<|message|>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "<end_of_turn>", "<end_of_utterance>",
         "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|>"], special_tokens=True,
    )  # fmt: skip
    rows = build_renderer(None, tokenizer).rows(ROUNDS)
    assert len(rows) == SHIPPED[name]
    spans = sorted(
        (turn, row.text[start:end]) for row in rows for turn, (start, end) in zip(row.turns, row.spans, strict=True)
    )
    assert [turn for turn, _ in spans] == [1, 3, 5]
    assert all(f"A{i}" in text for i, (_, text) in enumerate(spans, 1))


# ---- whole runs


@pytest.mark.parametrize(("jinja", "rows"), [(OPENS, 12), (QWEN3, 12), (GPT_OSS, 12), (LINES, 4)])
def test_sft_on_such_a_template(jinja, rows, own, tiny_model_dir, tmp_path):
    import shutil

    import supervised_finetuning

    shutil.copytree(tiny_model_dir, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(jinja, encoding="utf-8")
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": ROUNDS}) + "\n" for _ in range(4)), encoding="utf-8")
    supervised_finetuning.main(
        ["--model_name_or_path", str(tmp_path / "model"), "--train_file_dir", str(data), "--max_steps", "1"]
        + ["--output_dir", str(tmp_path / "out"), "--do_train", "True", "--packing", str(rows == 12)]
    )
    counts = json.loads((tmp_path / "out" / "data_report.json").read_text())["train"]["datasets"]["chats"]
    assert counts["further_rows_of_conversations"] == rows - 4


def test_a_stream_has_all_rows_of_a_conversation(own, tmp_path):
    from types import SimpleNamespace

    from stagewise.arguments import DataArguments
    from stagewise.data.loading import load_conversations

    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps({"messages": ROUNDS}) + "\n" for _ in range(4)), encoding="utf-8")
    tokenizer = own(GPT_OSS)
    training = SimpleNamespace(
        eval_strategy="no", save_strategy="no", logging_strategy="steps", max_steps=2, do_eval=False,
        accelerator_config=SimpleNamespace(dispatch_batches=None, split_batches=False), auto_find_batch_size=False,
        dataloader_num_workers=0, dataloader_multiprocessing_context=None, dataloader_in_order=True, seed=1,
        data_seed=None, local_process_index=0, process_index=0, world_size=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    found = load_conversations(
        DataArguments(train_file_dir=str(data), streaming=True),
        build_renderer(None, tokenizer),
        tokenizer,
        LONG,
        training,
    )
    rows = [row for row, _ in zip(found.train, range(6), strict=False)]
    assert [tokenizer.decode([t for t in row["labels"] if t >= 0]) for row in rows] == [
        "A1</s>",
        "A2</s>",
        "A3</s>",
    ] * 2
