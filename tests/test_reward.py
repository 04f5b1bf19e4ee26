"""The reward model: pairs to ids, what the audit sees, the loss, training, merging, scoring."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import inference
import merge_peft_adapter
from stagewise.data.collators import PairwiseCollator
from stagewise.data.preference_audit import audit_preferences, print_audit
from stagewise.data.preferences import (
    SAME_AFTER_TRUNCATION,
    SAME_ANSWERS,
    PreferenceOptions,
    encode_pairs,
    tokenize_preferences,
)
from stagewise.data.records import PreferencePair
from stagewise.data.tokenization import TemplateRenderer
from stagewise.errors import InputError
from stagewise.losses.preference import pairwise_reward_loss
from template import Rendered, get_template
from tests.stages import FULL, LORA, assert_same_weights, losses, run_rm, run_sft, weights

ROOT = Path(__file__).resolve().parents[1]
LONG = PreferenceOptions(max_length=1000)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
ROUNDS = [user("One?"), assistant("First."), user("Two?"), assistant("Second."), user("Three?")]
PAIR = PreferencePair([SYSTEM, *ROUNDS], [assistant("A good answer.")], [assistant("Go away.")])


@pytest.fixture(scope="module")
def chatml(tokenizer):
    return TemplateRenderer(get_template("chatml"), tokenizer)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# --- pairs to ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chatml", "vicuna", "alpaca"])
def test_prompt_and_completion_are_the_ids_of_the_whole_conversation(name, tokenizer):
    renderer = TemplateRenderer(get_template(name), tokenizer)
    (row,) = encode_pairs([PAIR], renderer, tokenizer, LONG)
    for completion, ids in ((PAIR.chosen, row.chosen_ids), (PAIR.rejected, row.rejected_ids)):
        assert row.prompt_ids + ids == ids_of(tokenizer, renderer.render([*PAIR.prompt, *completion]).text)
    assert row.prompt_ids == ids_of(tokenizer, renderer.render(PAIR.prompt, add_generation_prompt=True).text)
    assert "A good answer." in tokenizer.decode(row.chosen_ids)
    assert (row.chosen_length, row.rejected_length) == (len(row.chosen_ids), len(row.rejected_ids))
    assert (row.truncated, row.dropped) == ("", "")


def test_a_completion_of_several_turns_begins_at_its_first(chatml, tokenizer):
    pair = PreferencePair(PAIR.prompt, [assistant("x"), user("and?"), assistant("y")], [assistant("z")])
    (row,) = encode_pairs([pair], chatml, tokenizer, LONG)
    prompt = chatml.render(pair.prompt, add_generation_prompt=True).text
    assert row.prompt_ids == ids_of(tokenizer, prompt)
    assert tokenizer.decode(row.chosen_ids).startswith("x")


class Glue:
    """Writes contents one after the other with nothing between them, so that tokens straddle the border."""

    fingerprint = "glue"
    control_tokens = ()
    stop_tokens = ("</s>",)

    def render(self, messages, tools=None, add_generation_prompt=False):
        text, spans = "", []
        for message in messages:
            start = len(text)
            text += message["content"]
            if message["role"] == "assistant":
                text += "</s>"
                spans.append((start, len(text)))
        return Rendered(text, tuple(spans))


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.text("aethrnou 好的\n", min_size=1, max_size=12), *[st.text("aethrnou 好的\n", max_size=12)] * 2)
def test_a_straddling_token_moves_the_border_back(tokenizer, prompt, chosen, rejected):
    pair = PreferencePair([user(prompt)], [assistant(chosen)], [assistant(rejected)])
    (row,) = encode_pairs([pair], Glue(), tokenizer, LONG)
    whole = [ids_of(tokenizer, f"{prompt}{answer}</s>") for answer in (chosen, rejected)]
    assert [row.prompt_ids + row.chosen_ids, row.prompt_ids + row.rejected_ids] == whole
    # no token of the prompt reaches into an answer
    assert prompt.startswith(tokenizer.decode(row.prompt_ids).rstrip("\ufffd"))
    assert row.dropped == (SAME_ANSWERS if chosen == rejected else "")


def test_a_token_over_the_border_belongs_to_the_completion(tokenizer):
    """ "a" + "t" is one token, so the prompt ends before it on both sides."""
    assert len(ids_of(tokenizer, "at")) == 1
    pair = PreferencePair([user("x\na")], [assistant("t")], [assistant("!")])
    (row,) = encode_pairs([pair], Glue(), tokenizer, LONG)
    sides = [tokenizer.decode(ids) for ids in (row.prompt_ids, row.chosen_ids, row.rejected_ids)]
    assert sides == ["x\n", "at</s>", "a!</s>"]


def prompt_length(messages, renderer, tokenizer):
    return len(ids_of(tokenizer, renderer.render(messages, add_generation_prompt=True).text))


def test_long_prompts_lose_their_oldest_rounds(chatml, tokenizer):
    kept = [SYSTEM, *ROUNDS[2:]]
    limit = prompt_length(kept, chatml, tokenizer)
    (row,) = encode_pairs([PAIR], chatml, tokenizer, PreferenceOptions(1000, limit))
    assert row.prompt_ids == ids_of(tokenizer, chatml.render(kept, add_generation_prompt=True).text)
    assert row.truncated == "prompt"
    (row,) = encode_pairs([PAIR], chatml, tokenizer, PreferenceOptions(1000, limit - 1))
    assert row.prompt_ids == ids_of(tokenizer, chatml.render([SYSTEM, ROUNDS[-1]], add_generation_prompt=True).text)
    # without a limit of its own the prompt gives way where the row is too long
    (row,) = encode_pairs([PAIR], chatml, tokenizer, PreferenceOptions(limit + row.chosen_length))
    assert len(row.prompt_ids) == limit
    assert row.truncated == "prompt"


def test_a_prompt_whose_last_round_does_not_fit_cannot_be_used(chatml, tokenizer):
    last = prompt_length([SYSTEM, ROUNDS[-1]], chatml, tokenizer)
    (row,) = encode_pairs([PAIR], chatml, tokenizer, PreferenceOptions(1000, last - 1))
    assert row.dropped == f"{last} tokens, a prompt that does not fit max_prompt_length"
    (row,) = encode_pairs([PAIR], chatml, tokenizer, PreferenceOptions(last))
    assert row.dropped == f"{last} tokens, a prompt that does not fit max_length"
    with pytest.raises(InputError, match="--max_prompt_length 64: expected 1 or more, and less than --max_length"):
        PreferenceOptions(64, 64)


def test_completions_are_cut_from_their_end(chatml, tokenizer):
    pair = PreferencePair([user("q")], [assistant("yes yes yes no")], [assistant("yes yes yes yes")])
    (whole,) = encode_pairs([pair], chatml, tokenizer, LONG)
    differ = next(i for i, (a, b) in enumerate(zip(whole.chosen_ids, whole.rejected_ids, strict=False)) if a != b)
    prompt = len(whole.prompt_ids)
    (cut,) = encode_pairs([pair], chatml, tokenizer, PreferenceOptions(prompt + differ + 1))
    assert cut.chosen_ids == whole.chosen_ids[: differ + 1]
    assert cut.rejected_ids == whole.rejected_ids[: differ + 1]
    assert (cut.truncated, cut.dropped, cut.chosen_length) == ("completion", "", whole.chosen_length)
    (same,) = encode_pairs([pair], chatml, tokenizer, PreferenceOptions(prompt + differ))
    assert same.dropped == SAME_AFTER_TRUNCATION


# --- the audit -------------------------------------------------------------------------------------------------------


def records(*pairs: PreferencePair) -> Dataset:
    return Dataset.from_dict(
        {
            "record": [pair.to_json() for pair in pairs],
            "location": [f"pairs.jsonl:{i + 1}" for i in range(len(pairs))],
            "dataset": ["pairs"] * len(pairs),
        }
    )


def pair_of(chosen: str, rejected: str) -> PreferencePair:
    return PreferencePair([user("Which?")], [assistant(chosen)], [assistant(rejected)])


def test_the_audit_counts_what_a_model_could_learn_by_mistake(chatml, tokenizer):
    data = records(
        pair_of("yes yes yes yes", "yes"),  # only length differs; chosen is longer
        pair_of("no no", "yes yes yes yes"),
        pair_of("0 0 0 0 0 0", "1 1"),  # chosen is longer
        pair_of("a a a a a a a a 1", "a a a a a a a a 2"),  # the same after truncation; equally long
        pair_of("same", "same"),
    )
    prompt = prompt_length([user("Which?")], chatml, tokenizer)
    encoded = tokenize_preferences(data, chatml, tokenizer, PreferenceOptions(prompt + 8))
    audit = audit_preferences(data, encoded, chatml, tokenizer)
    assert (audit.pairs, audit.equal, audit.equal_after_truncation, audit.only_length_differs) == (5, 1, 1, 1)
    assert audit.chosen_longer == 2 / 4
    answers = [("yes yes yes yes", "yes"), ("no no", "yes yes yes yes"), ("0 0 0 0 0 0", "1 1")]
    ends = "<|im_end|>\n"
    ratios = [len(ids_of(tokenizer, one + ends)) / len(ids_of(tokenizer, other + ends)) for one, other in answers]
    assert audit.length_ratio == pytest.approx((sum(ratios) + 1) / 4)
    assert audit.checked == 3


def printed(audit, encoded, tokenizer, n_pairs=0) -> str:
    out = io.StringIO()
    print_audit(audit, encoded, tokenizer, n_pairs, Console(file=out, width=140, force_terminal=n_pairs > 0))
    return out.getvalue()


def test_chosen_answers_that_are_simply_longer_are_pointed_out(chatml, tokenizer):
    for pairs, warned in (
        ([pair_of(f"this is a much longer answer {i}", f"no {i}") for i in range(5)], True),
        ([pair_of(f"yes {i}", f"not {i}") for i in range(4)] + [pair_of("a b c d", "e f g")], False),
    ):
        data = records(*pairs)
        encoded = tokenize_preferences(data, chatml, tokenizer, LONG)
        audit = audit_preferences(data, encoded, chatml, tokenizer)
        assert audit.longer_is_better == warned
        assert ("warning: the chosen answer is simply the longer one" in printed(audit, encoded, tokenizer)) == warned


def test_pairs_are_printed_side_by_side(chatml, tokenizer):
    data = records(pair_of("It is good today.", "It is bad today."))
    encoded = tokenize_preferences(data, chatml, tokenizer, LONG)
    text = printed(audit_preferences(data, encoded, chatml, tokenizer), encoded, tokenizer, 1)
    assert text.count("Which?") == 1
    assert "\x1b[1;32mgoo\x1b[0m" in text
    assert "\x1b[1;31mba\x1b[0m" in text
    assert f"chosen, {encoded[0]['chosen_length']} tokens" in text


def test_a_prompt_that_inference_would_not_feed_stops_the_run(chatml, tokenizer):
    data = records(PAIR)
    rows = tokenize_preferences(data, chatml, tokenizer, LONG).to_list()
    for change, message in (
        ({"prompt_ids": rows[0]["prompt_ids"][:5] + [7] + rows[0]["prompt_ids"][5:]}, "inference feeds"),
        ({"chosen_ids": rows[0]["chosen_ids"][:2]}, "chosen_ids hold no stop token"),
    ):
        with pytest.raises(InputError, match=rf"pairs\.jsonl:1: {message}"):
            audit_preferences(data, Dataset.from_list([rows[0] | change]), chatml, tokenizer)


# --- loss and scores -------------------------------------------------------------------------------------------------


def test_pairwise_loss_by_hand():
    """-log sigmoid(1) = 0.3132617, of -1 1.3132617, of 0.5 0.4740770; the sums 3 and 1 squared are 9 and 1."""
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 1.0])
    assert pairwise_reward_loss(chosen, rejected).item() == pytest.approx(0.8132617)
    assert pairwise_reward_loss(chosen, rejected, torch.tensor([0.5, 0.0])).item() == pytest.approx(0.8936693)
    assert pairwise_reward_loss(chosen, rejected, center_coefficient=0.01).item() == pytest.approx(0.8632617)
    assert pairwise_reward_loss(chosen, rejected, num_pairs=8).item() == pytest.approx(1.6265234 / 8)
    assert pairwise_reward_loss(chosen, chosen).item() == pytest.approx(0.6931472)
    # far off, where sigmoid itself would be 0
    assert pairwise_reward_loss(torch.tensor([-200.0]), torch.tensor([200.0])).item() == pytest.approx(400.0)


@pytest.fixture(scope="module")
def rm_dir(tiny_model_dir, preference_file, tmp_path_factory):
    """A reward adapter after enough steps to tell the sides apart."""
    folder = tmp_path_factory.mktemp("rm-run") / "out"
    flags = ("--lora_rank", "8", "--lora_dropout", "0", "--num_train_epochs", "6", "--learning_rate", "5e-3")
    run_rm(tiny_model_dir, preference_file, folder, *flags, "--validation_file_dir", preference_file)
    return folder


@pytest.fixture(scope="module")
def merged_dir(tiny_model_dir, rm_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rm-merged") / "out"
    merge_peft_adapter.main(["--base_model", tiny_model_dir, "--lora_model", str(rm_dir), "--output_dir", str(folder)])
    return folder


def test_training_tells_the_sides_apart(rm_dir):
    results = json.loads((rm_dir / "eval_results.json").read_text())
    assert results["eval_accuracy"] > 0.9
    assert results["eval_margin"] == pytest.approx(results["eval_chosen_score"] - results["eval_rejected_score"])
    assert (rm_dir / "scores.png").stat().st_size > 5000
    stage = json.loads((rm_dir / "stage.json").read_text())
    assert (stage["stage"], stage["head"], stage["template"]) == ("rm", "sequence_classification", "chatml")
    report = json.loads((rm_dir / "data_report.json").read_text())
    state = json.loads((rm_dir / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == 6 * report["train"]["datasets"]["pairs"]["tokens"]


def test_scores_do_not_depend_on_padding_or_order(merged_dir):
    model = AutoModelForSequenceClassification.from_pretrained(merged_dir).eval()
    pad = model.config.pad_token_id
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, 500, (n,), generator=generator) for n in (5, 17, 9, 30)]

    @torch.no_grad()
    def score(rows, width, left=False):
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place], mask[i, place] = row, 1
        return model(ids, attention_mask=mask).logits.squeeze(-1)

    alone = torch.cat([score([row], len(row)) for row in rows])
    assert alone.std() > 1e-2
    for found in (
        score(rows, 30),
        score(rows, 64),
        score(rows, 30, left=True),
        score(rows, 64, left=True),
        score(rows[::-1], 40).flip(0),
    ):
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


def test_a_batch_holds_the_chosen_rows_first():
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6], "margin": 0.5, "dataset": "b"},
        {"prompt_ids": [7], "chosen_ids": [8, 9], "rejected_ids": [10], "margin": 0.0, "dataset": "a"},
    ]
    batch = PairwiseCollator(0, ("a", "b"))(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [7, 8, 9, 0, 0], [1, 2, 4, 5, 6], [7, 10, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == batch["num_tokens"].tolist() == [3, 3, 5, 2]
    assert batch["margin"].tolist() == [0.5, 0.0]
    assert batch["dataset_id"].tolist() == [1, 0]


def test_a_padding_token_that_ends_rows_is_replaced(tokenizer, tiny_model_dir):
    from stagewise.modeling.loading import reserve_padding

    own = AutoTokenizer.from_pretrained(tiny_model_dir)
    reserve_padding(own, ("</s>",))
    assert own.pad_token == "<pad>"
    for stop in ("</s>", "<|im_end|>"):
        own.pad_token = stop
        reserve_padding(own, ("</s>", "<|im_end|>"))
        assert own.pad_token == "<unk>"


def test_the_head_is_trained_in_float32_on_a_bf16_base(tiny_model_dir, preference_file, tmp_path):
    run_rm(tiny_model_dir, preference_file, tmp_path / "o", *LORA, "--max_steps", "2", "--dtype", "bfloat16")
    (head,) = [tensor for name, tensor in weights(tmp_path / "o").items() if "score" in name]
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [LORA, FULL], ids=["lora", "full"])
def test_resume_equals_no_interruption(mode, tiny_model_dir, preference_file, tmp_path):
    flags = (*mode, "--max_steps", "8", "--eval_strategy", "steps", "--eval_steps", "4")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_rm(tiny_model_dir, preference_file, whole, *flags)
    resumed.mkdir()
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    run_rm(tiny_model_dir, preference_file, resumed, *flags, "--resume_from_checkpoint", "True")
    assert len(losses(whole)) == 8
    assert losses(resumed) == losses(whole)
    assert_same_weights(whole, resumed, rtol=0, atol=0)


def test_gradient_accumulation_changes_nothing(tiny_model_dir, preference_file, tmp_path):
    """22 pairs in steps of 4: the last step of the epoch has two, and as micro-batches of 3 and 1 none is even."""
    shared = ("--max_train_samples", "22", "--num_train_epochs", "1", "--do_train", "True")
    for name, flags in (
        ("one", ("--per_device_train_batch_size", "6")),
        ("six", ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "6")),
        ("uneven", ("--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2")),
    ):
        run_rm(tiny_model_dir, preference_file, tmp_path / name, *FULL, *shared, *flags)
    one = losses(tmp_path / "one")
    assert len(one) == 4
    for name in ("six", "uneven"):
        assert one == pytest.approx(losses(tmp_path / name), rel=1e-5)
        assert_same_weights(tmp_path / "one", tmp_path / name, rtol=1e-4, atol=1e-4)


def test_two_processes_equal_one(tiny_model_dir, preference_file, tmp_path):
    shared = (*FULL, "--max_steps", "3", "--do_train", "True", "--save_strategy", "no")
    run_rm(tiny_model_dir, preference_file, tmp_path / "one", *shared)
    code = "import sys; from tests.stages import run_rm; from pathlib import Path; a = sys.argv[1:]; "
    (tmp_path / "start.py").write_text(code + "run_rm(a[0], a[1], Path(a[2]), *a[3:])")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(tmp_path / "start.py"), tiny_model_dir, preference_file, str(tmp_path / "two"), *shared]
        + ["--per_device_train_batch_size", "2"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    assert_same_weights(tmp_path / "one", tmp_path / "two", rtol=1e-4, atol=1e-4)


def test_evaluation_is_the_mean_over_all_pairs(tiny_model_dir, preference_file, rm_dir, merged_dir, tmp_path):
    """The figures of the run, from the merged model's scores of each row alone."""
    found = [
        run_rm(
            str(merged_dir), preference_file, tmp_path / size, *LORA, "--do_eval", "True", "--do_train", "False",
            "--per_device_eval_batch_size", size, "--validation_file_dir", preference_file,
            "--center_rewards_coefficient", "0.1",
        )
        for size in ("1", "7")
    ]  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(merged_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged_dir)
    renderer = TemplateRenderer(get_template("chatml"), tokenizer)
    rows = [json.loads(line) for line in Path(preference_file).read_text().splitlines()]
    encoded = encode_pairs([PreferencePair.from_row(row) for row in rows], renderer, tokenizer, LONG)
    with torch.no_grad():
        chosen, rejected = (
            np.array([model(torch.tensor([row.prompt_ids + getattr(row, side)])).logits.item() for row in encoded])
            for side in ("chosen_ids", "rejected_ids")
        )
    loss = np.log1p(np.exp(rejected - chosen)) + 0.1 * (chosen + rejected) ** 2
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(loss.mean(), rel=1e-4)
        assert metrics["eval_accuracy"] == (chosen > rejected).mean()
        assert metrics["eval_margin"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)


def test_a_margin_asks_for_more(tiny_model_dir, preference_file, tmp_path):
    rows = [json.loads(line) for line in Path(preference_file).read_text().splitlines()]
    data = tmp_path / "margins.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": r["question"], "chosen": r["response_chosen"], "rejected": r["response_rejected"]})
            + "\n"
            for r in rows
        )
    )
    with_margin = tmp_path / "with" / "margins.jsonl"
    with_margin.parent.mkdir()
    lines = [json.dumps(json.loads(line) | {"margin": 3.0}) for line in data.read_text().splitlines()]
    with_margin.write_text("\n".join(lines) + "\n")
    flags = (*FULL, "--max_steps", "1", "--do_train", "True", "--learning_rate", "0")
    for name, file in (("plain", data), ("margin", with_margin)):
        run_rm(tiny_model_dir, str(file), tmp_path / name, *flags)
    # an untrained head: differences near 0, so about log 2, and about -log sigmoid(-3) = 3.0486
    assert losses(tmp_path / "plain")[1] == pytest.approx(0.6931, abs=0.2)
    assert losses(tmp_path / "margin")[1] == pytest.approx(3.0486, abs=0.4)


def test_counts_of_the_run_are_in_the_data_report(tiny_model_dir, tmp_path):
    rows = [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"prompt": "q", "chosen": "yes", "rejected": "not at all"},
        {"prompt": "q", "chosen": " ".join(["a"] * 60) + " 1", "rejected": " ".join(["a"] * 60) + " 2"},
        {"prompt": "q", "chosen": " ".join(["b"] * 60), "rejected": "no"},
        {"history": [["h " * 30, "r"]], "prompt": "q", "chosen": "yes", "rejected": "no"},
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--max_length", "40", "--max_prompt_length", "20", "--max_steps", "1", "--do_train", "True")
    run_rm(tiny_model_dir, str(data), tmp_path / "o", *LORA, *flags)
    report = json.loads((tmp_path / "o" / "data_report.json").read_text())["train"]
    assert report["rows"] == 4
    assert report["datasets"]["pairs"]["dropped"] == {SAME_AFTER_TRUNCATION: 1}
    assert report["datasets"]["pairs"]["truncated"] == {"completion": 2, "prompt": 1}


def test_equal_pairs_stop_the_run_or_are_counted(tiny_model_dir, tmp_path, capsys):
    rows = [{"prompt": f"q{i}", "chosen": "yes", "rejected": "no" if i else "yes"} for i in range(12)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"pairs\.jsonl:1: field 'rejected'.*two different answers"):
        run_rm(tiny_model_dir, str(data), tmp_path / "o", "--dry_run", "True")
    run_rm(tiny_model_dir, str(data), tmp_path / "o", "--dry_run", "True", "--on_bad_row", "skip")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "equal, dropped" in line]
    assert line.split()[-2] == "1"


# --- merging and scoring ---------------------------------------------------------------------------------------------


def test_merging_keeps_the_scores(tiny_model_dir, rm_dir, merged_dir):
    from peft import PeftModel

    base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    adapter = PeftModel.from_pretrained(base, rm_dir).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(merged_dir).eval()
    assert merged.config.num_labels == 1
    ids = torch.randint(10, 500, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, other = adapter(ids).logits, merged(ids).logits
    assert one.shape == (4, 1)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    assert json.loads((merged_dir / "stage.json").read_text())["head"] == "sequence_classification"
    assert json.loads((merged_dir / "merge_report.json").read_text())["top1_agreement"] == 1.0


def test_a_bf16_merge_of_a_reward_model_is_no_failure(tiny_model_dir, rm_dir, tmp_path):
    report = merge_peft_adapter.main(
        ["--base_model", tiny_model_dir, "--lora_model", str(rm_dir), "--output_dir", str(tmp_path / "m")]
        + ["--dtype", "bfloat16"]
    )
    assert report["saved"]["max_logit_difference"] > report["max_logit_difference"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_a_file_is_scored_alike_by_adapter_and_merged_model(
    tiny_model_dir, preference_file, rm_dir, merged_dir, tmp_path
):
    chats = tmp_path / "chats.jsonl"
    lines = []
    for line in Path(preference_file).read_text().splitlines()[:6]:
        row = json.loads(line)
        for kind in ("chosen", "rejected"):
            turns = [("human", row["question"]), ("gpt", row[f"response_{kind}"])]
            lines.append({"conversations": [{"from": who, "value": text} for who, text in turns], "kind": kind})
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = {}
    for name, flags in (
        ("adapter folder", ["--model_name_or_path", str(rm_dir)]),
        ("base and adapter", ["--model_name_or_path", tiny_model_dir, "--lora_model", str(rm_dir)]),
        ("merged", ["--model_name_or_path", str(merged_dir)]),
        ("merged, one by one", ["--model_name_or_path", str(merged_dir), "--batch_size", "1"]),
    ):
        out = tmp_path / f"{name}.jsonl"
        found = inference.main([*flags, "--score", "--input_file", str(chats), "--output_file", str(out)])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert found == {"scored": 12}
        assert [row["kind"] for row in rows] == ["chosen", "rejected"] * 6
        scores[name] = [row["score"] for row in rows]
    for found in scores.values():
        assert found == pytest.approx(scores["merged"], abs=1e-4)
    assert min(scores["merged"][::2]) > max(scores["merged"][1::2])


def test_a_full_reward_model_is_scored_with(tiny_model_dir, preference_file, tmp_path):
    run_rm(tiny_model_dir, preference_file, tmp_path / "o", *FULL, "--max_steps", "2")
    chats, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    chats.write_text(json.dumps({"question": "What is 2 plus 2?", "answer": "Gladly: it is 4."}) + "\n")
    inference.main(
        ["--model_name_or_path", str(tmp_path / "o"), "--score", "--input_file", str(chats), "--output_file", str(out)]
    )
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "o").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "o")
    messages = [user("What is 2 plus 2?"), assistant("Gladly: it is 4.")]
    ids = ids_of(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False))
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits.item()
    assert json.loads(out.read_text())["score"] == pytest.approx(expected, abs=1e-5)


# --- what cannot work ------------------------------------------------------------------------------------------------


def test_dry_run_prints_the_audit_and_writes_nothing(tiny_model_dir, preference_file, tmp_path, capsys):
    run_rm(tiny_model_dir, preference_file, tmp_path / "o", "--dry_run", "True")
    text = capsys.readouterr().out
    assert "Preference audit of " in text
    assert "nothing was written" in text
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_prompt_length", "128"], "--max_prompt_length 128: expected"),
        (["--max_length", "4096"], "--max_length 4096: the model was made for 1024"),
        (["--max_length", "8"], "a prompt that does not fit max_length"),
        (["--streaming", "True", "--max_steps", "2"], "--streaming: pairs are counted"),
        (["--label_smoothing_factor", "0.1"], "--label_smoothing_factor: reward_modeling.py has no labels"),
        (["--center_rewards_coefficient", "-1"], "--center_rewards_coefficient: found -1.0"),
        (["--max_target_length", "64"], "--max_target_length: found without --max_source_length"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    flags, message, tiny_model_dir, preference_file, tmp_path
):
    with pytest.raises(InputError, match=message):
        run_rm(tiny_model_dir, preference_file, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


# MedicalGPT's run_rm.sh of 2023; paths and model replaced, the template named (its own default was vicuna).
OLD_RM = """--model_type auto --per_device_train_batch_size 3 --per_device_eval_batch_size 1 --do_train --do_eval
    --use_peft True --seed 42 --max_train_samples 10 --max_eval_samples 4 --num_train_epochs 1 --learning_rate 2e-5
    --warmup_ratio 0.05 --weight_decay 0.001 --logging_strategy steps --logging_steps 10 --eval_steps 50
    --evaluation_strategy steps --save_steps 500 --save_strategy steps --save_total_limit 3 --max_source_length 160
    --max_target_length 60 --overwrite_output_dir --ddp_timeout 30000 --logging_first_step True --target_modules all
    --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --torch_dtype float32 --device_map auto --report_to tensorboard
    --ddp_find_unused_parameters False --remove_unused_columns False --gradient_checkpointing True
    --template_name vicuna"""


def test_a_command_line_of_2023_runs(tiny_model_dir, preference_file, tmp_path):
    import reward_modeling

    metrics = reward_modeling.main(
        ["--model_name_or_path", tiny_model_dir, "--train_file_dir", preference_file, "--output_dir", str(tmp_path)]
        + ["--validation_file_dir", preference_file, *OLD_RM.split()]
    )
    assert metrics["eval_loss"] > 0
    config = (tmp_path / "run_config.yaml").read_text()
    assert "max_length: 220\n" in config
    assert "max_prompt_length: 160\n" in config


def test_an_architecture_without_a_score_head_is_named_before_weights(tmp_path, preference_file):
    model = tmp_path / "chatglm"
    model.mkdir()
    auto_map = {"AutoConfig": "configuration_chatglm.ChatGLMConfig", "AutoModel": "modeling_chatglm.ChatGLMModel"}
    (model / "config.json").write_text(json.dumps({"model_type": "chatglm", "auto_map": auto_map}))
    (model / "pytorch_model.bin").touch()
    with pytest.raises(InputError, match="chatglm has no AutoModelForSequenceClassification.*llama.*DPO"):
        run_rm(str(model), preference_file, tmp_path / "out", "--allow_pickle", "True")


def test_a_reward_model_goes_on_and_a_classifier_does_not(tiny_model_dir, preference_file, merged_dir, tmp_path):
    flags = ("--max_steps", "1", "--learning_rate", "0", "--do_train", "True")
    run_rm(str(merged_dir), preference_file, tmp_path / "on", *FULL, *flags)
    old, new = weights(merged_dir), weights(tmp_path / "on")
    assert torch.equal(old["score.weight"], new["score.weight"])
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "classifier")
    with pytest.raises(InputError, match="sorts texts into 3 classes"):
        run_rm(str(tmp_path / "classifier"), preference_file, tmp_path / "out")


def test_links_of_the_chain_that_do_not_fit_are_refused(
    tiny_model_dir, preference_file, sft_file, text_file, rm_dir, merged_dir, tmp_path
):
    from tests.stages import run_pt

    out = tmp_path / "out"
    for run, data in ((run_rm, preference_file), (run_sft, sft_file), (run_pt, text_file)):
        with pytest.raises(InputError, match=r"is an adapter, not a model; merge it.*merge_peft_adapter\.py"):
            run(str(rm_dir), data, out)
    for run, data in ((run_sft, sft_file), (run_pt, text_file)):
        with pytest.raises(InputError, match="is a reward model: it gives a score"):
            run(str(merged_dir), data, out)
    with pytest.raises(InputError, match="was trained for a reward model.*this stage trains a language model"):
        run_sft(tiny_model_dir, sft_file, out, "--peft_path", str(rm_dir))
    with pytest.raises(InputError, match="is a reward model, it scores answers and writes none; pass --score"):
        inference.main(["--model_name_or_path", str(merged_dir), "--prompt", "hi"])
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    with pytest.raises(InputError, match="--score: .* is no reward model"):
        inference.main(
            ["--model_name_or_path", tiny_model_dir, "--template_name", "chatml", "--score"]
            + ["--input_file", str(chats), "--output_file", str(out)]
        )
    assert not out.exists()
