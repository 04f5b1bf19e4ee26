"""Tiny tokenizers and models, built in memory once per session; as many threads as there is a core for."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")  # run_tests.sh says 1, for files side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import json
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
# The longest files begin first, or one of them would run on alone when the others are done.
LONGEST = (
    "test_real_model.py",
    "test_shell.py", "test_launchers.py", "test_engines_on_real_vocabularies.py", "test_kills.py",
    "test_distributed.py", "test_waiting.py", "test_machines.py", "test_streaming.py", "test_multitask_training.py",
    "test_ppo.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


# For tests/test_fuzzing.py: --hypothesis-profile deep
settings.register_profile("deep", max_examples=1000, deadline=None, database=None)


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """Arrow caches of the session, away from the user's."""
    import datasets

    folder = tmp_path_factory.mktemp("hf-cache")
    datasets.config.HF_DATASETS_CACHE = folder
    os.environ["HF_DATASETS_CACHE"] = str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> str:
    """A 2-layer Llama (hidden 64) and its byte-level BPE tokenizer, as examples/build_tiny_model.py makes them."""
    from examples.build_tiny_model import main

    folder = tmp_path_factory.mktemp("tiny") / "model"
    main(["--output_dir", str(folder), "--vocab_size", "600", "--hidden_size", "64", "--num_hidden_layers", "2"])
    return str(folder)


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory) -> str:
    """24 short conversations, some with several rounds, some with a system prompt."""
    rows = []
    for i in range(24):
        turns = [
            {"from": "human", "value": f"What is {i} plus {i}?"},
            {"from": "gpt", "value": f"It is {2 * i}."},
        ]
        if i % 3 == 0:
            turns += [{"from": "human", "value": "And one more?"}, {"from": "gpt", "value": f"Then {2 * i + 1}. 好的"}]
        if i % 4 == 0:
            turns.insert(0, {"from": "system", "value": "You add numbers."})
        rows.append({"conversations": turns})
    path = tmp_path_factory.mktemp("sft") / "sums.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def preference_file(tmp_path_factory) -> str:
    """24 pairs: the chosen answer is polite, the rejected one rude; some have a history or a system prompt."""
    rows = []
    for i in range(24):
        rows.append(
            {
                "system": "You add numbers." if i % 4 == 0 else "",
                "history": [["Hello", "Hello, how can I help?"]] if i % 3 == 0 else [],
                "question": f"What is {i} plus {i}?",
                "response_chosen": f"Gladly: it is {2 * i}." + (" Ask me anytime." if i % 2 else ""),
                "response_rejected": "Who cares, count yourself." + ("" if i % 2 else " Leave me alone now."),
            }
        )
    path = tmp_path_factory.mktemp("preferences") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> str:
    """30 documents of 5 to 60 words."""
    documents = [" ".join(f"word{(i * j) % 17}" for j in range(5 + (i * 7) % 56)) + "." for i in range(1, 31)]
    path = tmp_path_factory.mktemp("pt") / "corpus.txt"
    path.write_text("\n\n".join(documents) + "\n", encoding="utf-8")
    return str(path)
