"""stage.json: where a model comes from, so that the next stage takes over what it must and refuses what is wrong."""

import hashlib
import json
import logging
import socket
from datetime import date, datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers import PretrainedConfig

from stagewise.distributed import decide_on_first, groups_of_rows, uses_fsdp, zero_stage
from stagewise.errors import InputError
from stagewise.modeling.loading import is_reward_model
from stagewise.modeling.model_files import read_json
from stagewise.modeling.reward import same_base
from stagewise.modeling.rope_scaling import STAGE_FILE as FILE
from stagewise.modeling.rope_scaling import describe, rope_setting, saved_setting

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "deepspeed", "bitsandbytes")


def read_stage(folder: str | Path | None) -> dict | None:
    """The stage.json of a model folder, or None where there is none (a model of somebody else's)."""
    path = Path(folder or ".") / FILE
    if folder is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}; delete it to use the model without its history") from error


def read_parent(model: str | None, takes_reward_model: bool = False) -> dict | None:
    """The stage.json of the model that a stage starts from, or None; refuses what is no start for it.

    Args:
        takes_reward_model: the stage trains a score head, and may go on with one.

    Raises:
        InputError: `model` is an adapter that was not merged, or a reward model where a language model is needed.
    """
    folder = Path(model or ".")
    if model is None or not folder.is_dir():
        return None
    if (folder / "adapter_config.json").is_file():
        base = read_json("--model_name_or_path", folder / "adapter_config.json").get("base_model_name_or_path")
        raise InputError(
            f"--model_name_or_path {model}: is an adapter, not a model; merge it and start from the result: "
            f"python merge_peft_adapter.py --base_model {base} --lora_model {model} --output_dir {model}-merged"
        )
    if not takes_reward_model and is_reward_model(model):
        raise InputError(
            f"--model_name_or_path {model}: is a reward model: it gives a score and has no language-model head; "
            "start from the model that it was trained from (base_model in its stage.json)"
        )
    return read_stage(folder)


def check_resumed(checkpoint: str | None, config: PretrainedConfig) -> None:
    """Refuse to go on from a checkpoint of a run with another --rope_scaling: its weights fit other positions.

    Raises:
        InputError: the checkpoint says what it was trained with, and it is not what `config` has.
    """
    saved = saved_setting(checkpoint)
    if saved is not None and saved["rope"] != rope_setting(config):
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: was trained with {describe(saved['rope'])}, and now there is "
            f"{describe(rope_setting(config))}; pass the --rope_scaling and --model_max_length of the run"
        )


def check_data(checkpoint: str | None, fingerprint: str) -> None:
    """Refuse to go on with other rows: what was trained, and what is left, would be counted in rows of the first data.

    Raises:
        InputError: the checkpoint says what it was trained on, and it is not what there is now.
    """
    then = (read_stage(checkpoint) or {}).get("data_fingerprint") if checkpoint else None
    if "streaming" in (then, fingerprint):  # it goes by its position
        return
    if then is not None and then != fingerprint:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: its run was begun on other training rows (their number, content "
            "or order, or what limits and splits them), so that rows would be trained twice or never; give it the "
            "data of then, or train on from its result in a folder of its own (--peft_path, or --model_name_or_path "
            "where all weights are trained)"
        )


def day_of_run(checkpoint: str | None) -> str:
    """What a chat template that prints the date takes for today, as 2025-12-31, the same on all processes: the day on
    which the run was begun, also when it goes on after midnight. Its rows would change in mid-epoch otherwise.
    """

    def decide() -> str:
        return (read_stage(checkpoint) or {}).get("day") or date.today().isoformat()

    return decide_on_first(decide)


def layout_of(args) -> dict[str, str | int]:
    """What a step is made of: engine ("plain", "zero2", "fsdp"), processes, rows_per_step of all of them, precision of
    its products ("bf16", "fp16", "float32").
    """
    engine = "fsdp" if uses_fsdp(args) else f"zero{zero_stage(args)}" if args.deepspeed else "plain"
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * groups_of_rows(args)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    return {"engine": engine, "processes": args.world_size, "rows_per_step": rows, "precision": precision}


def check_layout(checkpoint: str | None, args) -> None:
    """Refuse to go on with steps of another size or precision, or under another engine; say where going on is not
    exact.

    Raises:
        InputError: a step of the checkpoint's run took other rows, or multiplied in another precision, or its
            optimizer cannot be read here.
    """
    then = (read_stage(checkpoint) or {}).get("layout") if checkpoint else None
    if then is None:
        return
    now, flag = layout_of(args), f"--resume_from_checkpoint {checkpoint}"
    rows, small = then["rows_per_step"], args.per_device_train_batch_size * groups_of_rows(args)
    if rows != now["rows_per_step"]:
        remedy = f"--gradient_accumulation_steps {rows // small}" if rows % small == 0 else f"{rows} rows a step again"
        raise InputError(
            f"{flag}: its steps took {rows} rows each, and these would take {now['rows_per_step']} "
            "(--per_device_train_batch_size x --gradient_accumulation_steps x processes), so that rows were trained "
            f"twice or never; pass {remedy}"
        )
    if then["engine"] != now["engine"]:
        raise InputError(
            f"{flag}: was written by {then['engine']}, and {now['engine']} cannot read its optimizer; go on with the "
            "engine it was begun with"
        )
    precision = then.get("precision", now["precision"])
    if precision != now["precision"]:
        remedy = "--bf16 False" if precision == "float32" else f"--{precision} True"
        raise InputError(
            f"{flag}: was trained in {precision}, and this run would go on in {now['precision']}; pass {remedy}"
        )
    if then["processes"] == now["processes"]:
        return
    if args.deepspeed:
        raise InputError(
            f"{flag}: DeepSpeed cut it for {then['processes']} processes, and there are {now['processes']}; start as "
            "many as before"
        )
    if args.should_log:
        logger.warning(
            "begun by %d processes, gone on by %d: each step takes the rows it would have taken, but what is drawn at "
            "random (dropout, noise, answers) and the last digits of sums will not be the same",
            then["processes"], now["processes"],
        )  # fmt: skip


def missing_random_state(checkpoint: str | None, args) -> str | None:
    """What is wrong where a checkpoint of as many processes holds no random numbers for this one; None where it does.

    On machines that share no folder each holds those of its own processes.
    """
    if checkpoint is None or args.world_size == 1:
        return None
    then, name = (read_stage(checkpoint) or {}).get("layout"), f"rng_state_{args.process_index}.pth"
    if then is None or then["processes"] != args.world_size or Path(checkpoint, name).is_file():
        return None
    return (
        f"--resume_from_checkpoint {checkpoint}: {name} is not on {socket.gethostname()}, so it is another machine's "
        "copy; give each machine the rank (NODE_RANK) that it had, or all of them one output_dir"
    )


def check_reward_model(path: str | None, template: str | None, config: PretrainedConfig) -> None:
    """Refuse a reward model that was trained on another chat template than the one the policy writes, or, as an
    adapter on the policy's own base, with another RoPE scaling.

    Args:
        config: the policy's.

    Raises:
        InputError: both templates are known and differ; both settings are known and differ.
    """
    stage = read_stage(path) if path and Path(path).is_dir() else None
    trained = (stage or {}).get("template")
    if trained and template and trained != template:
        raise InputError(
            f"--reward_model_path {path}: was trained on the template {trained}, and the policy writes {template}, "
            f"which it has never seen; train a reward model on {template}, or pass --template_name {trained}"
        )
    saved = saved_setting(path)
    if path and saved is not None and saved["rope"] != rope_setting(config) and same_base(path, config.name_or_path):
        raise InputError(
            f"--reward_model_path {path}: was trained with {describe(saved['rope'])}, and the policy, on whose base "
            f"it is, has {describe(rope_setting(config))}; give both the same --rope_scaling and --model_max_length, "
            "or merge the reward model"
        )


def write_stage(folder: str | Path, **fields: object) -> dict:
    """Write stage.json: the given fields, the versions, the time.

    Fields of a training run: stage, base_model, parent (the base model's own stage.json or None), template, head
    ("causal_lm", "sequence_classification"), adapter (bool), dtype, quantization (of the base, or None: see
    stagewise.modeling.quantization), data_fingerprint, day (that the chat template wrote, or None), rope (rope_setting
    of the model's configuration), layout (see layout_of).
    """
    stage = {
        **fields,
        "versions": {name: found for name in PACKAGES if (found := installed_version(name))},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    Path(folder, FILE).write_text(json.dumps(stage, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return stage


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def fingerprint(*parts: str) -> str:
    """A short stable name for what `parts` identify (data set fingerprints, for instance)."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
