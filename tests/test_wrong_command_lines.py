"""Command lines that cannot work, as a user meets them: exit 2 in seconds, a line or two that name flag and remedy,
nothing tokenized, no weights loaded, nothing written; and --dry_run says the same.
"""

import importlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagewise.run.exit_codes import run_script

STAGES = ("pretraining", "supervised_finetuning", "reward_modeling", "dpo_training", "ppo_training")
DATA = {"pretraining": "@text.txt", "supervised_finetuning": "@chats.jsonl", "ppo_training": "@chats.jsonl"}
TEMPLATE = ("--template_name", "chatml")
# What makes a command line of each script work; what a case gives comes behind and counts.
WORKING = {
    "pretraining": (),
    "supervised_finetuning": TEMPLATE,
    "reward_modeling": TEMPLATE,
    "dpo_training": TEMPLATE,
    "ppo_training": (*TEMPLATE, "--reward_function", "@rewards.py:length", "--max_new_tokens", "16"),
    "merge_peft_adapter": ("--base_model", "@base", "--lora_model", "@adapter", "--output_dir", "out"),
    "inference": ("--model_name_or_path", "@base", *TEMPLATE),
    "convert_dataset": ("--in_file", "@chats.jsonl", "--out_file", "out.jsonl", "--data_type", "sharegpt"),
}


@dataclass
class Case:
    """flags: of a script that would work without them; @name is something of `places`.
    message: what the error has to say, in capitals or not. without: flags of the working line to leave out.
    """

    script: str
    flags: str
    message: tuple[str, ...]
    without: tuple[str, ...] = ()

    def argv(self, places: Path) -> list[str]:
        working = list(WORKING[self.script])
        if self.script in STAGES:
            data = DATA.get(self.script, "@pairs.jsonl")
            working += ["--model_name_or_path", "@base", "--train_file_dir", data, "--output_dir", "out"]
        for flag in self.without:
            at = working.index(flag)
            del working[at : at + 2]
        return [re.sub(r"^@", f"{places}/", word) for word in [*working, *self.flags.split()]]


def case(script: str, flags: str, *message: str, without: str = ""):
    return pytest.param(Case(script, flags, message, tuple(without.split())), id=f"{script.split('_')[0]} {flags}")


PT, SFT, RM, DPO, PPO = STAGES
MERGE, INFERENCE, CONVERT = "merge_peft_adapter", "inference", "convert_dataset"

TRAINING = [
    # flags
    case(SFT, "--modle_name_or_path base", "--modle_name_or_path", "did you mean --model_name_or_path?"),
    case(RM, "--learning_rat 1e-4", "--learning_rat", "did you mean --learning_rate?"),
    case(PPO, "--reward_model_pth rm", "--reward_model_pth", "did you mean --reward_model_path?"),
    case(PT, "--packing perhaps", "--packing", "perhaps"),
    case(SFT, "--learning_rate fast", "--learning_rate", "fast", "float"),
    case(DPO, "--dtype int8", "--dtype", "int8", "bfloat16"),
    case(PT, "--document_separator paragraph", "--document_separator", "paragraph", "blank_line"),
    case(SFT, "--output_dir=", "--output_dir: missing"),
    case(PT, "", "--model_name_or_path: missing", "--config_name", without="--model_name_or_path"),
    case(RM, "", "--train_file_dir: missing", "--dataset_name", without="--train_file_dir"),
    case(PPO, "", "--reward_model_path", "--reward_function", "one of them", without="--reward_function"),
    # numbers
    case(PT, "--block_size 0", "--block_size 0", "2 or more"),
    case(PT, "--block_size -5", "--block_size -5", "2 or more"),
    case(SFT, "--lora_rank 0", "--lora_rank", "1 or more"),
    case(RM, "--max_prompt_length 300 --max_length 200", "--max_prompt_length 300", "--max_length", "200"),
    case(RM, "--center_rewards_coefficient -1", "--center_rewards_coefficient", "-1", "0 or more"),
    case(PT, "--label_smoothing_factor 1", "--label_smoothing_factor", "below 1"),
    case(SFT, "--adam_beta1 1.5", "--optim", "beta", "1.5", "--adam"),
    case(DPO, "--beta 0", "--beta", "above 0"),
    case(DPO, "--loss_type robust --label_smoothing 0.5", "--label_smoothing", "below 0.5"),
    case(PPO, "--num_mini_batches 0", "--num_mini_batches", "1 or more"),
    case(PPO, "--temperature 0", "--temperature 0", "above 0"),
    # together
    case(SFT, "--load_in_4bit --load_in_8bit", "--load_in_8bit", "--load_in_4bit", "one of the two"),
    case(SFT, "--load_in_8bit --use_peft False", "--load_in_8bit", "cannot be trained", "--use_peft False"),
    case(DPO, "--dtype float16 --use_peft False", "--dtype float16", "cannot be float16", "--fp16 True"),
    case(SFT, "--early_stopping_stall_num 3", "--early_stopping_stall_num", "--eval_strategy steps"),
    case(SFT, "--min_lr 1e-6 --lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps", "--min_lr", "no floor"),
    case(SFT, '--lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":2}', "--lr_scheduler_kwargs", "cycles"),
    case(RM, "--load_best_model_at_end --eval_strategy no", "load_best_model_at_end", "eval"),
    case(RM, "--shift_attn True", "--shift_attn", "reward_modeling.py", "supervised_finetuning.py"),
    case(RM, "--streaming True", "--streaming", "leave it out"),
    case(PT, "--streaming True", "--streaming", "--max_steps"),
    case(PT, "--weighted_loss_mode case3 --task_weights 1,2", "--task_weights", "--train_file_dir"),
    case(PT, "--router_aux_loss_coef 0.01", "--router_aux_loss_coef", "mixture of experts", "leave the flag out"),
    case(PT, "--model_name_or_path @bloom --tokenizer_name_or_path @base", "bloom", "--packing False"),
    case(SFT, "--packing_strategy sequential", "--packing_strategy", "--packing True"),
    case(DPO, "--loss_type sigmod", "--loss_type", "sigmod", "sigmoid"),
    case(DPO, "--loss_type sigmoid,ipo --loss_weights 1", "--loss_weights", "1 for 2"),
    case(DPO, "--loss_type exo_pair", "--loss_type exo_pair", "--label_smoothing"),
    case(DPO, "--reference_free --ref_model_name_or_path @twin", "--ref_model_name_or_path", "--reference_free"),
    case(DPO, "--target_modules q_proj,lm_head", "--target_modules", "lm_head", "leave it out"),
    case(PPO, "--total_episodes 64 --max_steps 3", "--total_episodes", "--max_steps", "one of them"),
    case(PPO, "--label_smoothing_factor 0.1", "--label_smoothing_factor", "leave it at 0"),
    case(RM, "--label_smoothing_factor 0.1", "--label_smoothing_factor", "no labels", "leave it at 0"),
    case(DPO, "--label_smoothing_factor 0.1", "--label_smoothing_factor", "no labels", "leave it at 0"),
    case(SFT, "--batch_eval_metrics True", "--batch_eval_metrics", "leave the flag out"),
    case(RM, "--batch_eval_metrics True", "--batch_eval_metrics", "leave the flag out"),
    case(RM, "--use_liger_kernel True", "--use_liger_kernel", "leave it out"),
    case(PPO, "--use_liger_kernel True", "--use_liger_kernel", "PPO", "leave it out"),
    case(PPO, "--value_init reward_model", "--value_init reward_model", "--value_init zero"),
    # files of settings
    case(SFT, "--deepspeed nowhere.json", "--deepspeed nowhere.json", "cannot be read"),
    case(SFT, "--deepspeed @broken.json", "--deepspeed", "broken.json", "not valid JSON"),
    case(PT, "--fsdp full_shard", "--fsdp", "on CPU", "zero3.json"),
    case(PT, '--parallelism_config {"cp_size":2}', "--parallelism_config", "cp_size 2", "CUDA alone", "sp_size"),
    case(SFT, '--parallelism_config {"tp_size":2}', "--parallelism_config", "tp_size 2", "never shown", "zero3.json"),
    case(SFT, '--parallelism_config {"sp_size":2}', "--parallelism_config", "sp_size 2", "1 processes", "multiple"),
    case(SFT, '--parallelism_config {"sp_size":0}', "--parallelism_config", "0 for sp_size", "number of processes"),
    case(SFT, '--parallelism_config {"sp_handler":{}}', "--parallelism_config", "'sp_handler'", "and no more"),
    case(SFT, '--parallelism_config {"dp_shard_size":2}', "--parallelism_config", "is 2", "leave them out"),
    case(SFT, "--parallelism_config @broken.json", "--parallelism_config", "broken.json", "not valid JSON"),
    # data
    case(SFT, "--train_file_dir @nowhere", "--train_file_dir", "nowhere", "no such file"),
    case(RM, "--validation_file_dir @nowhere.jsonl", "--validation_file_dir", "nowhere.jsonl", "no such file"),
    case(PPO, "--train_file_dir @empty.jsonl", "empty.jsonl", "empty"),
    # the model
    case(PT, "--model_name_or_path ./moddels/base", "--model_name_or_path ./moddels/base", "no such folder"),
    case(SFT, "--model_name_or_path moddels/base", "--model_name_or_path moddels/base", "no such folder", "hub"),
    case(RM, "--model_name_or_path moddels/base", "--model_name_or_path moddels/base", "no such folder", "hub"),
    case(SFT, "--model_name_or_path @base/config.json", "is a file", "give the folder"),
    case(SFT, "--model_name_or_path @no_config", "no_config", "no config.json", "give the folder"),
    case(SFT, "--model_name_or_path @unfinished", "no config.json", "checkpoint-3"),
    case(PPO, "--model_name_or_path @bad_config", "bad_config/config.json", "JSON", "anew"),
    case(SFT, "--model_name_or_path @no_type", "config.json", "model_type"),
    case(RM, "--model_name_or_path @no_weights", "no_weights", "model.safetensors", "copy"),
    case(DPO, "--model_name_or_path @cut", "cut/model.safetensors", "cut off", "download it again"),
    case(PT, "--model_name_or_path @shard_missing", "model-00002-of-", "missing", "index.json"),
    case(PPO, "--model_name_or_path @shard_cut", "model-00001-of-", "cut off", "download it again"),
    case(SFT, "--model_name_or_path @other_sizes", "config.json", "160", "48", "same model"),
    case(SFT, "--model_name_or_path @adapter", "is an adapter", "merge_peft_adapter.py --base_model"),
    case(SFT, "--model_name_or_path @reward_model", "is a reward model", "language-model head"),
    case(RM, "--model_name_or_path @classifier", "3 classes", "one score"),
    case(SFT, "--model_type bloom", "--model_type bloom", "llama", "leave the flag out"),
    case(PT, "--config_name ./nowhere --tokenizer_name_or_path @base", "--config_name ./nowhere", "no such folder",
         without="--model_name_or_path"),
    case(PT, "--config_name @base/config.json", "--tokenizer_name_or_path", without="--model_name_or_path"),
    # the tokenizer and the template
    case(SFT, "--template_name chatlm", "--template_name chatlm", "chatml"),
    case(SFT, "--template_name llama3", "llama3", "--add_template_tokens"),
    case(SFT, "", "template", "--template_name", without="--template_name"),
    case(DPO, "--template_name llama3 --add_template_tokens", "--add_template_tokens", "supervised_finetuning.py"),
    case(RM, "--tokenizer_name_or_path ./nowhere", "--tokenizer_name_or_path ./nowhere", "no such folder"),
    case(DPO, "--tokenizer_name_or_path @no_tokenizer", "--tokenizer_name_or_path", "no tokenizer there"),
    case(SFT, "--model_name_or_path @no_eos", "--model_name_or_path", "no eos_token", "tokenizer_config.json"),
    case(PPO, "--tokenizer_name_or_path @big", "--tokenizer_name_or_path", "610 tokens", "600 rows",
         "--modules_to_save"),
    case(SFT, "--use_fast_tokenizer False", "--use_fast_tokenizer", "leave the flag out"),
    # lengths
    case(PT, "--block_size 4096", "--block_size 4096", "1024 positions", "--rope_scaling"),
    case(SFT, "--model_max_length 4096", "--model_max_length 4096", "1024 positions", "--rope_scaling"),
    case(DPO, "--max_length 4096", "--max_length 4096", "1024 positions", "--rope_scaling"),
    case(PPO, "--max_prompt_length 1000 --max_new_tokens 100", "--max_new_tokens 100", "1000", "1024"),
    case(SFT, "--rope_scaling yarn", "--rope_scaling yarn", "--model_max_length"),
    case(SFT, "--rope_scaling linear --model_max_length 512", "--rope_scaling linear", "1024 positions", "512"),
    # the adapter
    case(SFT, "--target_modules q_prox", "--target_modules", "q_prox", "down_proj", "q_proj", "v_proj"),
    case(PPO, "--target_modules q_proj,v_prox", "--target_modules", "named v_prox", "down_proj", "v_proj"),
    case(PT, "--target_modules input_layernorm", "--target_modules", "input_layernorm", "down_proj"),
    case(RM, "--modules_to_save embeds", "--modules_to_save", "embeds", "embed_tokens"),
    case(PT, "--trainable_params nrom", "--trainable_params", "nrom", "norm"),
    case(SFT, "--peft_path ./nowhere", "--peft_path ./nowhere", "no such folder"),
    case(DPO, "--peft_path @base", "--peft_path", "no adapter_config.json", "folder of an adapter"),
    case(SFT, "--peft_path @adapter_json", "adapter_config.json", "JSON", "anew"),
    case(SFT, "--peft_path @adapter_cut", "adapter_model.safetensors", "cut off", "again"),
    case(SFT, "--peft_path @wide_adapter", "--peft_path", "not for this base", "128", "64", "trained on"),
    case(PPO, "--peft_path @deep_adapter", "--peft_path", "not for this base", "layers.2", "trained on"),
    case(PT, "--peft_path @bloom_adapter", "--peft_path", "another base", "query_key_value", "q_proj"),
    case(SFT, "--peft_path @twin_adapter", "--peft_path", "twin", "other weights", "--model_name_or_path"),
    case(RM, "--peft_path @adapter", "--peft_path", "language model", "reward model"),
    case(SFT, "--peft_path @adapter --use_peft False", "--peft_path", "--use_peft False"),
    # the reference and the reward
    case(DPO, "--ref_model_name_or_path ./nowhere", "--ref_model_name_or_path ./nowhere", "no such folder"),
    case(DPO, "--ref_model_name_or_path @adapter", "--ref_model_name_or_path", "is an adapter", "--lora_model"),
    case(DPO, "--ref_model_name_or_path @cut", "--ref_model_name_or_path", "cut/model.safetensors", "cut off"),
    case(DPO, "--ref_model_name_or_path @small", "--ref_model_name_or_path", "500 tokens", "600", "same tokenizer"),
    case(PPO, "--reward_model_path ./nowhere", "--reward_model_path ./nowhere", "no such folder",
         without="--reward_function"),
    case(PPO, "--reward_model_path @base", "--reward_model_path", "no score head", "reward_modeling.py",
         without="--reward_function"),
    case(PPO, "--reward_model_path @other_reward", "--reward_model_path", "tokenizer", "610", "600",
         without="--reward_function"),
    case(PPO, "--reward_model_path @orphan_reward", "--reward_model_path", "its base", "gone", "no such folder",
         without="--reward_function"),
    case(PPO, "--reward_function nowhere.py:length", "--reward_function nowhere.py:length", "no such file"),
    case(PPO, "--reward_function @rewards.py:lenght", "--reward_function", "no function lenght"),
    case(PPO, "--reward_function no_module_here:length", "--reward_function", "no_module_here", "file.py:length"),
    # the machine
    case(SFT, "--fp16 True", "--fp16", "on CPU", "--bf16"),
    case(SFT, "--tf32 True", "--tf32"),
    case(SFT, "--flash_attn True", "--flash_attn", "GPU", "leave --flash_attn out"),
    case(RM, "--attn_implementation flash_attention_2", "--attn_implementation", "GPU", "leave"),
    case(PT, "--attn_implementation flesh", "--attn_implementation flesh", "sdpa", "leave it out"),
    case(SFT, "--use_liger_kernel True", "--use_liger_kernel", "leave it out"),
    case(DPO, "--use_liger_kernel True", "--use_liger_kernel", "leave it out"),
    case(SFT, "--device_map cuda:0", "--device_map cuda:0", "no such device", "cpu"),
    case(SFT, "--device_map atuo", "--device_map atuo", "auto"),
    case(SFT, "--optim adamw_torch_4bit", "--optim", "torchao"),
    # where it goes, and where it goes on from
    case(SFT, "--output_dir @used", "--output_dir", "not empty", "--resume_from_checkpoint True",
         "--overwrite_output_dir"),
    case(PT, "--output_dir @broken.json", "--output_dir", "is a file", "another folder"),
    case(RM, "--output_dir @broken.json/run", "--output_dir", "broken.json is a file", "another folder"),
    case(PPO, "--resume_from_checkpoint ./nowhere", "--resume_from_checkpoint ./nowhere", "no such folder"),
    case(DPO, "--resume_from_checkpoint True", "--resume_from_checkpoint True", "no whole checkpoint", "leave"),
    case(SFT, "--resume_from_checkpoint @unfinished/checkpoint-3", "--resume_from_checkpoint", "missing"),
    case(SFT, "--resume_from_checkpoint @run/checkpoint-3 --output_dir @used", "--output_dir", "not empty",
         "--overwrite_output_dir"),
    case(SFT, "--resume_from_checkpoint @run/checkpoint-3 --use_peft False", "--resume_from_checkpoint", "adapter",
         "--use_peft False"),
    case(SFT, "--resume_from_checkpoint @run/checkpoint-3 --lora_rank 2", "--resume_from_checkpoint",
         "not for this base", "--lora_rank", "of its run"),
]  # fmt: skip

OTHERS = [
    case(MERGE, "", "--lora_model", "required", without="--lora_model"),
    case(MERGE, "--loar_model x", "--loar_model", "did you mean --lora_model?"),
    case(MERGE, "--dtype int8", "--dtype", "int8", "bfloat16"),
    case(MERGE, "--base_model ./nowhere", "--base_model ./nowhere", "no such folder"),
    case(MERGE, "--base_model @twin_adapter", "--base_model", "is an adapter", "--lora_model"),
    case(MERGE, "--base_model @cut", "--base_model", "cut/model.safetensors", "cut off"),
    case(MERGE, "--base_model @wide", "--lora_model", "not for this base", "64", "128", "trained on"),
    case(MERGE, "--base_model @bloom", "--lora_model", "another base", "q_proj", "query_key_value"),
    case(MERGE, "--lora_model ./nowhere", "--lora_model", "nowhere", "no adapter_config.json"),
    case(MERGE, "--lora_model @twin", "--lora_model", "full model", "nothing to merge"),
    case(MERGE, "--lora_model @adapter_cut", "--lora_model", "adapter_model.safetensors", "cut off"),
    case(MERGE, "--tokenizer_path ./nowhere", "--tokenizer_path ./nowhere", "no such folder"),
    case(MERGE, "--output_dir @used", "--output_dir", "not empty", "--overwrite"),
    case(MERGE, "--output_dir @broken.json", "--output_dir", "is a file", "another folder"),
    case(MERGE, "--output_dir @base", "--output_dir", "is what --base_model reads", "another folder"),
    case(MERGE, "--device gpu", "--device gpu", "no such device", "cpu"),
    case(MERGE, "--device cuda", "--device cuda", "no such device", "cpu"),
    case(MERGE, "--max_shard_size 5gigs", "--max_shard_size", "5gigs", "5GB"),
    case(INFERENCE, "", "--model_name_or_path", "required", without="--model_name_or_path"),
    case(INFERENCE, "--promt hello", "--promt", "did you mean --prompt?"),
    case(INFERENCE, "--model_name_or_path ./nowhere --prompt a", "--model_name_or_path ./nowhere", "no such folder"),
    case(INFERENCE, "--model_name_or_path @shard_missing --prompt a", "model-00002-of-", "missing"),
    case(INFERENCE, "--model_name_or_path @orphan --prompt a", "its base", "gone", "no such folder"),
    case(INFERENCE, "--lora_model @wide_adapter --prompt a", "--lora_model", "not for this base", "128", "64"),
    case(INFERENCE, "--template_name chatlm --prompt a", "--template_name chatlm", "chatml"),
    case(
        INFERENCE, "--prompt a --input_file @chats.jsonl --output_file o.jsonl", "--prompt", "--input_file", "give one"
    ),
    case(INFERENCE, "--input_file @chats.jsonl", "--input_file", "--output_file", "go together"),
    case(INFERENCE, "--input_file ./nowhere.jsonl --output_file o.jsonl", "--input_file", "nowhere.jsonl", "no such"),
    case(INFERENCE, "--input_file @chats.jsonl --output_file @chats.jsonl", "--output_file", "is also --input_file"),
    case(
        INFERENCE,
        "--input_file @chats.jsonl --output_file @wide_adapter/adapter_config.json --lora_model @wide_adapter",
        "--output_file",
        "may be a file of what --lora_model reads",
    ),
    case(INFERENCE, "--score", "--score", "--input_file"),
    case(INFERENCE, "--score --input_file @chats.jsonl --output_file o.jsonl", "--score", "no reward model"),
    case(INFERENCE, "--model_name_or_path @reward_model --prompt a", "is a reward model", "--score"),
    case(INFERENCE, "--max_new_tokens 0 --prompt a", "--max_new_tokens 0", "1 or more"),
    case(INFERENCE, "--top_p 2 --prompt a", "--top_p 2", "at most 1"),
    case(INFERENCE, "--batch_size 0 --prompt a", "--batch_size", "1 or more"),
    case(INFERENCE, "--device cuda --prompt a", "--device cuda", "no such device", "cpu"),
    case(INFERENCE, "--rope_scaling yarn --prompt a", "--rope_scaling", "--model_max_length", "go together"),
    case(CONVERT, "", "--in_file", "required", without="--in_file"),
    case(CONVERT, "--data_typ qa", "--data_typ", "did you mean --data_type?"),
    case(CONVERT, "--data_type sharegtp", "--data_type", "sharegtp", "sharegpt"),
    case(CONVERT, "--in_file ./nowhere.json", "--in_file", "nowhere.json", "no such file"),
    case(CONVERT, "--in_file @empty.jsonl", "--in_file", "empty.jsonl", "empty"),
    case(CONVERT, "--out_file ./nowhere/o.jsonl", "--out_file", "nowhere", "does not exist"),
    case(CONVERT, "--out_file o.csv", "--out_file", "o.csv", ".jsonl"),
    case(CONVERT, "--out_file @chats.jsonl", "--out_file", "is an input file"),
    case(CONVERT, "--out_file @empty.jsonl", "--out_file", "exists", "--overwrite"),
    case(CONVERT, "--on_bad_row ignore", "--on_bad_row", "ignore", "skip"),
]


@pytest.mark.parametrize("wrong", TRAINING)
@pytest.mark.parametrize("dry_run", [False, True], ids=["", "dry run"])
def test_training(wrong, dry_run, places, refuse):
    refuse(wrong, ("--dry_run", "True") if dry_run else ())


@pytest.mark.parametrize("wrong", OTHERS)
def test_scripts_that_train_nothing(wrong, places, refuse):
    refuse(wrong)


@pytest.mark.parametrize("dry_run", ["False", "True"])
def test_an_output_dir_that_cannot_be_written(dry_run, places, refuse, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and access(path, mode))
    wrong = Case(SFT, "--output_dir @locked/run", ("--output_dir", "locked cannot be written", "another folder"))
    refuse(wrong, ("--dry_run", dry_run))


@pytest.mark.parametrize("dry_run", ["False", "True"])
def test_a_tracker_that_is_not_installed(dry_run, refuse, monkeypatch):
    from stagewise.run import preflight

    monkeypatch.setattr(preflight, "get_available_reporting_integrations", lambda: ["tensorboard"])
    wrong = Case(PT, "--report_to tensorboard,wandb", ("--report_to wandb", "pip install wandb", "leave it out"))
    refuse(wrong, ("--dry_run", dry_run))


def test_a_settings_file_that_is_missing_or_broken(places, refuse, monkeypatch):
    for name, message in (("nowhere.yaml", "cannot be read"), ("broken.json", "not valid JSON")):
        argv = [str(places / name), "--output_dir", "out"]
        monkeypatch.setattr(Case, "argv", lambda self, places, argv=argv: argv)
        refuse(Case(SFT, "", (name, message)))


@pytest.mark.parametrize("script", STAGES)
def test_a_dry_run_loads_no_weights(script, places, no_weights, tmp_path, monkeypatch, capsys):
    """The same in every stage: data report, memory by engine, no file. What the cases change works without them."""
    monkeypatch.chdir(tmp_path)
    report = importlib.import_module(script).main([*Case(script, "", ()).argv(places), "--dry_run", "True"])
    printed = capsys.readouterr().out
    for said in ('"train": {', "Memory by estimate", "--deepspeed zero3.json", "steps an epoch; nothing was written"):
        assert said in printed
    assert report["estimated_memory_gib"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", STAGES)
def test_a_dry_run_looks_at_the_model(script, places, refuse):
    wrong = Case(script, "--target_modules q_prox", ("--target_modules", "q_prox", "down_proj", "q_proj"))
    refuse(wrong, ("--dry_run", "True"))


@pytest.mark.parametrize(
    "flags",
    [
        "--peft_path @adapter --model_name_or_path @copy",
        "--peft_path @moved_adapter",
        "--model_name_or_path @sharded",
        "--tokenizer_name_or_path @big --modules_to_save embed_tokens,lm_head",
        "--tokenizer_name_or_path @big --use_peft False",
        "--model_name_or_path @base/",
        "--output_dir @used --overwrite_output_dir",
    ],
)
def test_what_only_looks_wrong_is_let_through(flags, places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    importlib.import_module(SFT).main([*Case(SFT, flags, ()).argv(places), "--dry_run", "True"])
    assert "nothing was written" in capsys.readouterr().out


def heavy(*args, **kwargs):
    raise AssertionError("rows were tokenized, or weights loaded")


@pytest.fixture
def no_weights(monkeypatch):
    import transformers

    from stagewise.modeling import loading

    monkeypatch.setattr(loading, "_build_model", heavy)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", heavy)


@pytest.fixture
def refuse(places, no_weights, tmp_path, monkeypatch, capsys):
    """Runs a case where nothing heavy is allowed, and holds what it says and leaves against what a user may expect."""
    import torch

    from stagewise.data import loading as data

    for name in ("documents", "conversations", "preferences", "prompts"):
        monkeypatch.setattr(data, f"tokenize_{name}", heavy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.chdir(tmp_path)

    def run(wrong: Case, more: tuple[str, ...] = ()) -> None:
        before = contents(places)
        with pytest.raises(SystemExit) as stopped:
            run_script(lambda: importlib.import_module(wrong.script).main([*wrong.argv(places), *more]))
        printed = capsys.readouterr()
        assert stopped.value.code == 2, printed.err
        said = printed.err[printed.err.rindex("error: ") :]
        for phrase in wrong.message:
            assert phrase.lower() in said.lower()
        assert len(said.strip().splitlines()) <= 2
        assert "Traceback" not in printed.err
        assert list(tmp_path.iterdir()) == []
        assert contents(places) == before

    return run


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: size and time of the last change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def places(tiny_model_dir, sft_file, preference_file, text_file, tmp_path_factory) -> Path:
    """Data, and models and adapters that are well, or damaged in one way each."""
    root = tmp_path_factory.mktemp("places")
    for source, name in ((sft_file, "chats.jsonl"), (preference_file, "pairs.jsonl"), (text_file, "text.txt")):
        shutil.copy(source, root / name)
    (root / "empty.jsonl").touch()
    (root / "broken.json").write_text('{"seed": ')
    (root / "rewards.py").write_text("def length(prompts, completions):\n    return [len(c) for c in completions]\n")
    for name in ("used", "locked"):
        (root / name).mkdir()
        (root / name / "notes.txt").write_text("mine")
    shutil.copytree(tiny_model_dir, root / "base")
    _make_models(root)
    _damage_models(root)
    _make_adapters(root)
    return root


def _make_models(root: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    def make(name: str, config, auto_class=AutoModelForCausalLM) -> None:
        torch.manual_seed(7)
        auto_class.from_config(config).save_pretrained(root / name)
        for path in (root / "base").glob("tokenizer*"):
            shutil.copy(path, root / name)

    def like_base(**changes):
        return AutoConfig.from_pretrained(root / "base", **changes)

    make("twin", like_base())
    make("wide", like_base(hidden_size=128, head_dim=64))
    make("deep", like_base(num_hidden_layers=3))
    make("small", like_base(vocab_size=500))
    make("bloom", AutoConfig.for_model("bloom", vocab_size=600, hidden_size=64, n_layer=2, n_head=4))
    for name, labels in (("reward_model", 1), ("other_reward", 1), ("classifier", 3)):
        make(name, like_base(num_labels=labels, pad_token_id=3), AutoModelForSequenceClassification)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.add_tokens([f"<new {i}>" for i in range(610 - len(tokenizer))])
    for name in ("big", "other_reward"):
        tokenizer.save_pretrained(root / name)


def _damage_models(root: Path) -> None:
    from transformers import AutoModelForCausalLM

    def copy(name: str) -> Path:
        return shutil.copytree(root / "base", root / name)

    def change(path: Path, **changes) -> None:
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    (copy("no_config") / "config.json").unlink()
    _cut(copy("bad_config") / "config.json")
    change(copy("no_type") / "config.json", model_type=None)
    change(copy("other_sizes") / "config.json", intermediate_size=48)
    (copy("no_weights") / "model.safetensors").unlink()
    _cut(copy("cut") / "model.safetensors")
    change(copy("no_eos") / "tokenizer_config.json", eos_token=None)
    for path in copy("no_tokenizer").glob("tokenizer*"):
        path.unlink()
    model = AutoModelForCausalLM.from_pretrained(root / "base")
    copy("copy")
    for name in ("sharded", "shard_missing", "shard_cut"):
        (copy(name) / "model.safetensors").unlink()
        model.save_pretrained(root / name, max_shard_size="100KB")
    next((root / "shard_missing").glob("model-00002-of-*")).unlink()
    _cut(next((root / "shard_cut").glob("model-00001-of-*")))


def _make_adapters(root: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def make(name: str, base: str, task: str = "CAUSAL_LM") -> Path:
        auto_class = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
        model = auto_class.from_pretrained(root / base)
        get_peft_model(model, LoraConfig(task_type=task, target_modules="all-linear", r=4)).save_pretrained(
            root / name
        )
        return root / name

    make("adapter", "base")
    for base in ("wide", "deep", "twin", "bloom"):
        make(f"{base}_adapter", base)
    _cut(make("adapter_json", "base") / "adapter_config.json")
    _cut(make("adapter_cut", "base") / "adapter_model.safetensors")
    for name, task in (("orphan", "CAUSAL_LM"), ("moved_adapter", "CAUSAL_LM"), ("orphan_reward", "SEQ_CLS")):
        config = make(name, "base", task) / "adapter_config.json"
        config.write_text(
            json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(root / "gone")})
        )
    for folder in (make("run/checkpoint-3", "base"), root / "unfinished" / "checkpoint-3"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "trainer_state.json").write_text('{"global_step": 3}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (root / "run" / "checkpoint-3" / name).touch()


def _cut(path: Path) -> None:
    """Leave the first half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
