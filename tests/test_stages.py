"""End to end on the tiny model: what a run leaves behind, merging, chatting, bad input."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import inference
import merge_peft_adapter
from stagewise.arguments import DataArguments
from stagewise.data.loading import resolve_template
from stagewise.errors import InputError
from template import get_template, with_role_markers
from tests.stages import FULL, LORA, losses, run_pt, run_sft, weights

SHORT = ("--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_on_start", "True")


@pytest.fixture(scope="module")
def sft_dir(tiny_model_dir, sft_file, tmp_path_factory):
    """An SFT adapter after enough steps to differ from its base."""
    folder = tmp_path_factory.mktemp("sft-run") / "out"
    flags = ("--lora_rank", "8", "--num_train_epochs", "8", "--learning_rate", "1e-2", "--lora_dropout", "0")
    run_sft(tiny_model_dir, sft_file, folder, *flags, "--eval_strategy", "epoch", "--packing", "True")
    return folder


@pytest.fixture(scope="module")
def merged_dir(tiny_model_dir, sft_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged") / "out"
    merge_peft_adapter.main(
        ["--base_model", tiny_model_dir, "--lora_model", str(sft_dir), "--output_dir", str(folder)]
    )
    return folder


def test_training_lowers_the_loss(sft_dir):
    curve = losses(sft_dir)
    assert curve[max(curve)] < curve[1] - 0.5


def test_output_dir_holds_what_the_readme_lists(sft_dir):
    files = {path.name for path in sft_dir.iterdir()}
    assert files >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "train_results.json", "eval_results.json", "all_results.json", "trainer_state.json", "logs",
        "training_loss.png", "run_config.yaml", "data_report.json", "stage.json", "README.md",
    }  # fmt: skip
    assert list((sft_dir / "logs").glob("events.out.tfevents.*"))
    stage = json.loads((sft_dir / "stage.json").read_text())
    assert (stage["stage"], stage["template"], stage["adapter"]) == ("sft", "chatml", True)
    assert "transformers" in stage["versions"]
    report = json.loads((sft_dir / "data_report.json").read_text())
    sums = report["train"]["datasets"]["sums"]
    assert sums["rows_read"] == 24
    assert report["train"]["rows"] + report["validation"]["rows"] == 24
    assert 0 < sums["trained_tokens"] < sums["tokens"]


def test_the_log_has_throughput_and_the_evaluation_a_perplexity(sft_dir):
    history = json.loads((sft_dir / "trainer_state.json").read_text())["log_history"]
    assert all(entry["tokens_per_second"] > 0 for entry in history if "loss" in entry)
    results = json.loads((sft_dir / "eval_results.json").read_text())
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))


def test_real_tokens_are_counted_not_padding(tiny_model_dir, sft_file, tmp_path):
    run_sft(tiny_model_dir, sft_file, tmp_path, *LORA, "--num_train_epochs", "1", "--do_train", "True")
    report = json.loads((tmp_path / "data_report.json").read_text())
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["num_input_tokens_seen"] == report["train"]["datasets"]["sums"]["tokens"]


def test_run_config_repeats_the_run(tiny_model_dir, text_file, tmp_path):
    import pretraining

    first = tmp_path / "first"
    run_pt(tiny_model_dir, text_file, first, *LORA, *SHORT)
    config = yaml.safe_load((first / "run_config.yaml").read_text())
    assert config["max_steps"] == 4
    assert "use_cpu" not in config or torch.accelerator.is_available()
    second = tmp_path / "second"
    pretraining.main([str(first / "run_config.yaml"), "--output_dir", str(second)])
    assert losses(second) == losses(first)


def test_evaluation_is_the_token_mean_of_the_whole_set(tiny_model_dir, sft_file, tmp_path):
    """The same perplexity for every batch size, equal to the sum over all tokens by hand."""
    found = []
    for batch_size in ("1", "5"):
        folder = tmp_path / batch_size
        flags = ("--do_eval", "True", "--do_train", "False", "--per_device_eval_batch_size", batch_size)
        metrics = run_sft(tiny_model_dir, sft_file, folder, *LORA, *flags, "--validation_file_dir", sft_file)
        found.append(metrics["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    nll = tokens = 0
    from stagewise.data.records import Conversation
    from stagewise.data.tokenization import EncodingOptions, TemplateRenderer, encode_conversations
    from template import get_template

    renderer = TemplateRenderer(get_template("chatml"), tokenizer)
    for line in Path(sft_file).read_text(encoding="utf-8").splitlines():
        chat = Conversation.from_row(json.loads(line))
        (row,) = encode_conversations([chat], renderer, tokenizer, EncodingOptions(128))
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        targets = torch.tensor(row.labels[1:])
        nll += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
        tokens += int((targets != -100).sum())
    assert found[0] == pytest.approx(nll / tokens, rel=1e-5)


@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_gradient_accumulation_changes_nothing(stage, tiny_model_dir, text_file, sft_file, tmp_path):
    run, data = (run_pt, text_file) if stage == "pt" else (run_sft, sft_file)
    for name, flags in (
        ("one", ("--per_device_train_batch_size", "4")),
        ("four", ("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "4")),
    ):
        run(tiny_model_dir, data, tmp_path / name, *FULL, "--max_steps", "3", *flags)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert one == pytest.approx(four, rel=1e-5)


def test_merged_logits_equal_adapter_logits(tiny_model_dir, sft_dir, merged_dir):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    adapter = PeftModel.from_pretrained(base, sft_dir).eval()
    merged = AutoModelForCausalLM.from_pretrained(merged_dir).eval()
    ids = torch.randint(10, 500, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (adapter(ids).logits - merged(ids).logits).abs().max()
        with adapter.disable_adapter():
            effect = (adapter(ids).logits - merged(ids).logits).abs().max()
    assert difference < 1e-4
    assert effect > 0.1
    assert not (merged_dir / "adapter_config.json").exists()


def test_merge_report_and_what_travels(merged_dir, sft_dir):
    report = json.loads((merged_dir / "merge_report.json").read_text())
    assert report["max_logit_difference"] < 1e-4
    assert report["saved"]["max_logit_difference"] < 1e-4
    assert report["top1_agreement"] == report["saved"]["top1_agreement"] == 1.0
    assert report["update_lost"] == 0.0
    assert report["adapter_effect"] > 0.1
    trained, merged = (AutoTokenizer.from_pretrained(d) for d in (sft_dir, merged_dir))
    assert merged.chat_template == trained.chat_template
    stage = json.loads((merged_dir / "stage.json").read_text())
    assert (stage["stage"], stage["template"], stage["adapter"]) == ("sft", "chatml", False)


def test_merge_with_modules_to_save_and_new_tokens(tiny_model_dir, sft_file, tmp_path):
    """Template tokens that the tokenizer lacks are added, trained, and survive the merge."""
    flags = ("--lora_rank", "4", "--max_steps", "3", "--template_name", "llama3", "--add_template_tokens", "True")
    run_sft(tiny_model_dir, sft_file, tmp_path / "run", *flags)
    merge_peft_adapter.main(
        ["--base_model", tiny_model_dir, "--lora_model", str(tmp_path / "run"), "--output_dir", str(tmp_path / "m")]
    )
    merged, tokenizer = (c.from_pretrained(tmp_path / "m") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert len(tokenizer("<|eot_id|>", add_special_tokens=False)["input_ids"]) == 1
    assert merged.get_input_embeddings().weight.shape[0] >= len(tokenizer) > 600
    assert any("embed_tokens" in key for key in weights(tmp_path / "run"))


def test_merge_refuses_what_cannot_end_well(tiny_model_dir, sft_dir, merged_dir, tmp_path):
    def merge(base=tiny_model_dir, lora=sft_dir, out=None, *flags):
        out = out or tmp_path / "out"
        merge_peft_adapter.main(
            ["--base_model", str(base), "--lora_model", str(lora), "--output_dir", str(out), *flags]
        )

    with pytest.raises(InputError, match="not empty"):
        merge(out=merged_dir)
    with pytest.raises(InputError, match="holds a full model, not an adapter"):
        merge(lora=merged_dir)
    with pytest.raises(InputError, match="no adapter_config"):
        merge(lora=tmp_path)
    with pytest.raises(InputError, match="is what --lora_model reads"):
        merge(out=sft_dir)
    untrained = tmp_path / "untrained"
    shutil.copytree(sft_dir, untrained)
    from safetensors.torch import save_file

    tensors = weights(sft_dir)
    save_file(
        {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in tensors.items()},
        untrained / "adapter_model.safetensors",
    )
    with pytest.raises(InputError, match="changes nothing"):
        merge(lora=untrained)
    assert not (tmp_path / "out").exists()


def test_merge_in_bf16_says_what_it_costs(tiny_model_dir, sft_dir, tmp_path):
    report = merge_peft_adapter.main(
        ["--base_model", tiny_model_dir, "--lora_model", str(sft_dir), "--output_dir", str(tmp_path / "m")]
        + ["--dtype", "bfloat16"]
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert report["update_lost"] > 0
    assert report["max_logit_difference"] < 1e-4 < report["saved"]["max_logit_difference"]


def test_adapter_and_merged_model_answer_alike(tiny_model_dir, sft_dir, merged_dir, tmp_path, capsys):
    question = tmp_path / "q.jsonl"
    rows = [{"question": f"What is {i} plus {i}?", "id": i} for i in range(5)]
    question.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = {}
    for name, flags in (
        ("adapter folder", ["--model_name_or_path", str(sft_dir)]),
        ("base and adapter", ["--model_name_or_path", tiny_model_dir, "--lora_model", str(sft_dir)]),
        ("merged", ["--model_name_or_path", str(merged_dir)]),
        ("merged, one by one", ["--model_name_or_path", str(merged_dir), "--batch_size", "1"]),
    ):
        out = tmp_path / f"{name}.jsonl"
        inference.main([*flags, "--input_file", str(question), "--output_file", str(out), "--max_new_tokens", "12"])
        found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [row["id"] for row in found] == list(range(5))
        answers[name] = [row["response"] for row in found]
    assert len({tuple(a) for a in answers.values()}) == 1
    one = inference.main(
        ["--model_name_or_path", str(merged_dir), "--prompt", rows[0]["question"], "--max_new_tokens", "12"]
    )
    assert one["answer"] == answers["merged"][0]
    assert one["answer"] in capsys.readouterr().out


def test_chat_keeps_the_history(merged_dir, monkeypatch, capsys):
    lines = iter(["What is 2 plus 2?", "And one more?", "clear", "", "exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    original = inference.Chat.answer

    def answer(self, conversations, *args, **kwargs):
        seen.append([message["role"] for message in conversations[0]])
        return original(self, conversations, *args, **kwargs)

    monkeypatch.setattr(inference.Chat, "answer", answer)
    inference.main(["--model_name_or_path", str(merged_dir), "--max_new_tokens", "5"])
    assert seen == [["user"], ["user", "assistant", "user"]]
    assert capsys.readouterr().out.count("assistant>") == 2


def test_sampling_settings_reach_generation(merged_dir):
    from stagewise.modeling.generation import Sampling

    assert Sampling(temperature=0.0).as_generate_arguments()["do_sample"] is False
    hot = Sampling(temperature=0.7, top_p=0.5, repetition_penalty=1.2, max_new_tokens=3).as_generate_arguments()
    assert (hot["do_sample"], hot["temperature"], hot["top_p"], hot["repetition_penalty"]) == (True, 0.7, 0.5, 1.2)
    with pytest.raises(InputError, match="--top_p 0"):
        Sampling(top_p=0)
    with pytest.raises(InputError, match="more than the model's 1024 positions"):
        inference.main(["--model_name_or_path", str(merged_dir), "--prompt", "hi", "--max_new_tokens", "1024"])


def test_the_next_stage_takes_the_template_from_stage_json(merged_dir, sft_file, tmp_path, caplog):
    import supervised_finetuning

    supervised_finetuning.main(
        ["--model_name_or_path", str(merged_dir), "--train_file_dir", sft_file, "--output_dir", str(tmp_path / "o")]
        + ["--max_steps", "1", "--lora_rank", "2"]
    )
    stage = json.loads((tmp_path / "o" / "stage.json").read_text())
    assert stage["template"] == "chatml"
    assert stage["parent"]["stage"] == "sft"


def test_role_markers_travel(tiny_model_dir, sft_file, tmp_path):
    """Into the prompt, the saved chat template, and the next stage."""
    markers = {"system": "S: ", "user": "U: ", "assistant": "A: "}
    flags = ("--template_name", "mft", "--role_markers", json.dumps(markers), *FULL, "--do_train", "True")
    out = tmp_path / "sft"
    run_sft(tiny_model_dir, sft_file, out, *flags, "--max_steps", "1", "--save_strategy", "no")
    rendered = AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert rendered == "S: Add.\nU: 1 + 1?\nA: "
    stage = json.loads((out / "stage.json").read_text())
    found = resolve_template(DataArguments(train_file_dir=sft_file), stage)
    assert found == with_role_markers(get_template("mft"), markers)
    with pytest.raises(InputError, match="--role_markers: the tokenizer's own template"):
        resolve_template(DataArguments(train_file_dir=sft_file, role_markers=markers), None)


def test_peft_path_starts_from_the_old_weights(tiny_model_dir, sft_dir, sft_file, tmp_path):
    run_sft(
        tiny_model_dir, sft_file, tmp_path, "--peft_path", str(sft_dir), "--max_steps", "1", "--learning_rate", "0.0"
    )
    old, new = weights(sft_dir), weights(tmp_path)
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_training_from_a_configuration_alone(tiny_model_dir, text_file, tmp_path):
    import pretraining

    config = tmp_path / "config"
    config.mkdir()
    shutil.copy(Path(tiny_model_dir) / "config.json", config)
    flags = ["--config_name", str(config), "--tokenizer_name_or_path", tiny_model_dir, "--train_file_dir", text_file]
    pretraining.main([*flags, "--output_dir", str(tmp_path / "o"), "--use_peft", "False", "--max_steps", "2"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "o").num_parameters() > 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir).state_dict()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "o").state_dict()
    assert not torch.allclose(base["model.layers.0.mlp.up_proj.weight"], made["model.layers.0.mlp.up_proj.weight"])


def test_dry_run_writes_nothing(tiny_model_dir, sft_file, text_file, tmp_path, capsys):
    run_sft(tiny_model_dir, sft_file, tmp_path / "s", "--dry_run", "True")
    run_pt(tiny_model_dir, text_file, tmp_path / "p", "--dry_run", "True")
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "Label audit" in printed
    assert printed.count("nothing was written") == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--template_name", "chatlm"], "no such template|chatml"),
        (["--model_max_length", "4096"], "made for 1024 positions"),
        (["--target_modules", "q_prox"], "no linear layer named q_prox; there is: .*q_proj"),
        (["--modules_to_save", "embeds"], "no module named embeds"),
        (["--peft_path", "nowhere"], "nowhere: no such folder"),
        (["--model_type", "bloom"], "is of type llama"),
        (["--early_stopping_stall_num", "2"], "needs evaluations"),
        (["--template_name", "llama3"], "--add_template_tokens"),
        (["--dtype", "float16", "--use_peft", "False"], "cannot be float16"),
        (["--validation_file_dir", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model_max_length", "8"], "no trained token left"),
        (["--on_too_long", "error", "--model_max_length", "24"], "more than max_length 24"),
        (["--resume_from_checkpoint", "nowhere"], "no such folder"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(flags, message, tiny_model_dir, sft_file, tmp_path):
    from template import TemplateError

    out = tmp_path / "out"
    with pytest.raises((InputError, TemplateError), match=message):
        run_sft(tiny_model_dir, sft_file, out, *flags)
    assert not out.exists()


def test_bad_rows_leave_output_dir_as_it_was(tiny_model_dir, tmp_path):
    data = tmp_path / "bad.jsonl"
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    bad = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": None}]}
    data.write_text("\n".join(json.dumps(row) for row in [good, good, bad, bad]) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("mine")
    flags = ("--overwrite_output_dir", "True", "--max_steps", "1")
    with pytest.raises(InputError, match=r"bad\.jsonl:3: field 'conversations\[1\]\.value'.*1 more bad row"):
        run_sft(tiny_model_dir, str(data), out, *flags)
    assert [path.name for path in out.iterdir()] == ["keep.txt"]


def test_min_lr_is_a_floor(tiny_model_dir, text_file, tmp_path):
    flags = ("--max_steps", "8", "--learning_rate", "1e-3", "--min_lr", "4e-4", "--lr_scheduler_type", "linear")
    run_pt(tiny_model_dir, text_file, tmp_path, *LORA, *flags)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    # linear from 1e-3 to 0 in 8 steps: 1e-3 * (8 - n) / 8, never below the floor
    assert rates == pytest.approx([max(1e-3 * (8 - n) / 8, 4e-4) for n in range(8)])


def test_save_total_limit_keeps_the_best(tiny_model_dir, sft_file, tmp_path):
    """Beside the newest; what is held out is so different that the best comes early."""
    other = {"conversations": [{"from": "human", "value": "月亮"}, {"from": "gpt", "value": "星星和太阳在天上走。"}]}
    (tmp_path / "other.jsonl").write_text(json.dumps(other, ensure_ascii=False), encoding="utf-8")
    flags = ("--max_steps", "8", "--learning_rate", "3e-2", "--lr_scheduler_type", "constant", *FULL)
    flags += ("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--save_total_limit", "2")
    flags += ("--validation_file_dir", str(tmp_path / "other.jsonl"))
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    found = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = min(found, key=lambda step: found[step])
    assert best < 7
    kept = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}", "checkpoint-8"}


def test_early_stopping_stops_at_the_nth_stall(tiny_model_dir, text_file, tmp_path):
    flags = ("--max_steps", "20", "--learning_rate", "0.0", "--eval_strategy", "steps", "--eval_steps", "2")
    run_pt(tiny_model_dir, text_file, tmp_path, *LORA, *flags, "--save_steps", "2", "--early_stopping_stall_num", "3")
    # with a learning rate of 0 the first evaluation is the best one; three more without improvement end the run
    assert max(losses(tmp_path)) == 8


def test_several_data_sets_have_a_loss_each(tiny_model_dir, sft_file, tmp_path):
    other = tmp_path / "other.jsonl"
    shutil.copy(sft_file, other)
    metrics = run_sft(tiny_model_dir, f"{sft_file},{other}", tmp_path / "o", *LORA, "--max_steps", "1")
    assert metrics["eval_sums_loss"] > 0
    assert metrics["eval_other_loss"] > 0


def test_label_smoothing_raises_the_loss_it_reports(tiny_model_dir, text_file, tmp_path):
    """At a random start every token has about -ln(1/V) either way; smoothing must run and leave evaluation alone."""
    run_pt(tiny_model_dir, text_file, tmp_path / "plain", *FULL, "--max_steps", "2")
    metrics = run_pt(
        tiny_model_dir, text_file, tmp_path / "s", *FULL, "--max_steps", "2", "--label_smoothing_factor", "0.3"
    )
    assert losses(tmp_path / "s")[1] != losses(tmp_path / "plain")[1]
    assert metrics["eval_loss"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_fast_tokenizer", "False"], "leave the flag out"),
        (["--train_on", "last", "--train_on_prompt", "True"], "give one of the two"),
        (["--use_liger_kernel", "True"], "--use_liger_kernel"),
        (
            ["--min_lr", "1e-5", "--lr_scheduler_type", "reduce_lr_on_plateau", "--eval_strategy", "steps"],
            "takes no floor",
        ),
        (["--on_bad_row", "skip", "--model_max_length", "30"], "does not apply"),
    ],
)
def test_settings_that_cannot_be_honoured(flags, message, tiny_model_dir, sft_file, tmp_path):
    with pytest.raises(InputError, match=message):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", *flags, "--max_steps", "1")


def test_an_adapter_is_no_base_model(sft_dir, sft_file, tmp_path):
    with pytest.raises(InputError, match="is an adapter, not a model; merge it"):
        run_sft(str(sft_dir), sft_file, tmp_path / "out")


def test_tool_format_needs_a_template_of_ours(merged_dir, sft_file, tmp_path):
    import supervised_finetuning

    plain = tmp_path / "plain"
    shutil.copytree(merged_dir, plain)
    (plain / "stage.json").unlink()
    flags = ["--model_name_or_path", str(plain), "--train_file_dir", sft_file, "--output_dir", str(tmp_path / "o")]
    with pytest.raises(InputError, match="--tool_format qwen"):
        supervised_finetuning.main([*flags, "--tool_format", "qwen"])
