"""examples/law: every row is read by the loaders, in the formats that its README names."""

import json
from collections import Counter
from pathlib import Path

import pytest

from stagewise.data.records import Conversation, RecordOptions, RowError, detect_format
from stagewise.data.sources import find_sources, load_records

LAW = Path(__file__).resolve().parents[1] / "examples" / "law"
# file -> (format, rows, rows in Chinese)
FILES = {
    "self_cognition.json": ("alpaca", 40, 26),
    "law_qa.json": ("alpaca", 60, 42),
    "law_sft_pair.jsonl": ("qa", 12, 9),
    "law_sft_triplet.jsonl": ("law", 12, 9),
}
NAMES = RecordOptions(assistant_name="Lexi", assistant_author="the law class")


def rows(name: str) -> list[dict]:
    text = (LAW / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else [json.loads(line) for line in text.splitlines()]


def is_chinese(text: str) -> bool:
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def question_and_answer(row: dict, options: RecordOptions = NAMES) -> list[str]:
    return [message["content"] for message in Conversation.from_row(row, options).messages]


def test_the_folder_holds_these_files_and_a_readme():
    assert {path.name for path in LAW.iterdir()} == {*FILES, "README.md"}


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_loaded(name):
    source_format, count, chinese = FILES[name]
    loaded, reports = load_records("conversation", find_sources(str(LAW / name)), NAMES)
    ((task, dataset),) = loaded.items()
    assert (task, len(dataset), reports[task].rows_bad) == (Path(name).stem, count, 0)
    assert {detect_format(row, "conversation") for row in rows(name)} == {source_format}
    assert sum(is_chinese(row["output"]) for row in rows(name)) == chinese
    for record in dataset["record"]:
        messages = Conversation.from_json(record).messages
        assert [message["role"] for message in messages] == ["user", "assistant"]
        assert all(message["content"] == message["content"].strip() for message in messages)
    questions = Counter(Conversation.from_json(record).messages[0]["content"] for record in dataset["record"])
    assert max(questions.values()) == 1


def test_the_readme_counts_them():
    table = dict(
        line.strip("| ").split(" | ", 1)
        for line in (LAW / "README.md").read_text("utf-8").splitlines()
        if "json" in line and line[0] == "|"
    )
    for name, (_, count, chinese) in FILES.items():
        assert table[f"`{name}`"].startswith(f"{count} | {chinese} Chinese, {count - chinese} English |")


def test_every_self_cognition_answer_names_the_assistant_or_the_author():
    for row in rows("self_cognition.json"):
        assert "<NAME>" in row["output"], row
        question, answer = question_and_answer(row)
        assert "Lexi" in answer
        assert "<" not in question + answer
        with pytest.raises(RowError, match="--assistant_name"):
            question_and_answer(row, RecordOptions(assistant_author="the law class"))


def test_the_four_questions_of_the_examples_are_in_it():
    asked = {row["instruction"] for row in rows("self_cognition.json")}
    known = (LAW.parent / "identity_questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["question"] for line in known} <= asked


def test_references_stand_in_front_of_the_question_where_they_are_asked_for():
    for row in rows("law_sft_triplet.jsonl"):
        assert question_and_answer(row)[0] == row["input"]
        with_reference, _ = question_and_answer(row, RecordOptions(use_reference=True))
        assert with_reference == "\n".join([*row["reference"], row["input"]])
        assert row["reference"]


def test_no_row_pretends_to_quote_a_statute_or_a_decision():
    text = "".join((LAW / name).read_text(encoding="utf-8") for name in FILES)
    assert not any(mark in text for mark in ("《", "号判决", "条规定", "Article ", "Section ", "§"))
