"""What the stages make of a model: each cell of the table is found by a run, never written."""

import io
import json
import logging
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from stagewise.errors import InputError, TrainingDiverged
from tests.zoo.models import save_model

WORKS = "works"
LN_2 = 0.6931
_QUESTION, _ANSWER = "What is 2 plus 2?", "It is 4."


class Wrong(Exception):
    """A run ended, and what it left is not what it should be."""


@dataclass
class Bench:
    """The files of one model's cells. model: its folder; folder: where runs write."""

    model: Path
    folder: Path

    def run(self, main: Callable, name: str, *flags: str) -> Path:
        out = self.folder / name
        common = ("--report_to", "none", "--logging_steps", "1", "--save_strategy", "no")
        main(
            ["--model_name_or_path", str(self.model), "--do_train", "True", "--output_dir", str(out), *common, *flags]
        )
        return out

    def sft(self, name: str, *flags: str) -> Path:
        import supervised_finetuning

        rows = [
            {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}
            for question, answer in [(_QUESTION, _ANSWER), ("Hello, who are you?", "I count: one, two.")] * 4
        ]
        data = self._write("sft.jsonl", rows)
        flags = ("--model_max_length", "96", "--train_file_dir", data, *flags)
        return self.run(supervised_finetuning.main, name, *flags)

    def pairs(self) -> str:
        row = {"question": _QUESTION, "response_chosen": _ANSWER, "response_rejected": "Who cares, count yourself."}
        return self._write("pairs.jsonl", [{"system": "", "history": [], **row}] * 4)

    def _write(self, name: str, rows: list[dict]) -> str:
        path = self.folder / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)


def _logs(out: Path, key: str) -> list[float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


LORA = ("--lora_rank", "4", "--lora_dropout", "0")
STEPS = ("--per_device_train_batch_size", "8", "--learning_rate", "1e-2")


def lora_and_merge(bench: Bench) -> dict[str, str]:
    """LoRA on all; then merge, and reload with plain transformers and peft: the merged model is base + adapter."""
    cells = {"LoRA all": _cell(lambda: bench.sft("lora", *LORA, *STEPS, "--max_steps", "3"))}
    if cells["LoRA all"] == WORKS:
        cells["merge"] = _cell(lambda: _merge(bench))
    return cells


def _merge(bench: Bench) -> None:
    from peft import PeftModel

    import merge_peft_adapter

    adapter, merged = bench.folder / "lora", bench.folder / "merged"
    merge_peft_adapter.main(
        ["--base_model", str(bench.model), "--lora_model", str(adapter), "--output_dir", str(merged)]
    )
    ids = torch.arange(5, 29)[None]
    with torch.no_grad():
        base = _plain(bench.model)
        before = base(input_ids=ids).logits
        wanted = PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=ids).logits
        found = _plain(merged)(input_ids=ids).logits
    effect, difference = ((wanted - other).abs().max().item() for other in (before, found))
    if not difference < 1e-2 * effect:
        raise Wrong(f"merged and base + adapter differ by {difference:.1e}, the adapter's effect is {effect:.1e}")

    before, after = (load_file(path / "model.safetensors") for path in (bench.model, merged))
    if before.keys() != after.keys():
        raise Wrong(f"tensors that only one of base and merged has: {sorted(before.keys() ^ after.keys())[:4]}")
    towers = [name for name in before if "vision" in name or "visual" in name or "audio" in name]
    if changed := [name for name in towers if not torch.equal(before[name], after[name])]:
        raise Wrong(f"changed in the merge: {changed[:4]}")


def _plain(folder: Path) -> PreTrainedModel:
    """By the architecture that its configuration names, as a reader without this toolkit would."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(transformers, name).from_pretrained(folder).eval()


def full_and_stop(bench: Bench) -> dict[str, str]:
    """All weights, until the answer is learnt; plain generate() then answers, and stops."""
    flags = ("--use_peft", "False", *STEPS, "--max_steps", "60", "--logging_steps", "20")
    cells = {"full": _cell(lambda: bench.sft("full", *flags))}
    if cells["full"] == WORKS:
        cells["stops"] = _cell(lambda: _generate(bench.folder / "full"))
    return cells


def _generate(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = _plain(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = prompt["input_ids"]
    answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    new = answer[0, ids.shape[1] :]
    if len(new) == 40:
        raise Wrong(f"runs on: {tokenizer.decode(new)[:60]!r}")


def packed(bench: Bench) -> dict[str, str]:
    """The first loss over all rows is the same, packed or not."""

    def compare() -> None:
        flags = ("--use_peft", "False", "--max_steps", "1", "--per_device_train_batch_size", "8")
        still = _without_dropout(bench)
        one = _logs(still.sft("packed", "--packing", "True", *flags), "loss")[0]
        other = _logs(still.sft("unpacked", *flags), "loss")[0]
        if abs(one - other) > 1e-3:
            raise Wrong(f"the first loss is {one:.4f} packed and {other:.4f} unpacked")

    return {"packed": _cell(compare)}


def _without_dropout(bench: Bench) -> Bench:
    folder = bench.folder / "still"
    shutil.copytree(bench.model, folder)
    config = json.loads((folder / "config.json").read_text())
    random = [key for key, value in config.items() if isinstance(value, float) and ("drop" in key or "jitter" in key)]
    (folder / "config.json").write_text(json.dumps({**config, **dict.fromkeys(random, 0.0)}))
    return Bench(folder, bench.folder)


def reward_model(bench: Bench) -> dict[str, str]:
    import reward_modeling

    flags = ("--train_file_dir", bench.pairs(), "--max_steps", "2")
    return {"RM": _cell(lambda: bench.run(reward_modeling.main, "rm", *flags, *LORA, *STEPS))}


def dpo(bench: Bench) -> dict[str, str]:
    """The first loss is ln 2 (a run that begins elsewhere stops by itself), and the loss then falls."""
    import dpo_training

    def train() -> None:
        flags = ("--train_file_dir", bench.pairs(), "--max_steps", "3")
        losses = _logs(bench.run(dpo_training.main, "dpo", *flags, *LORA, *STEPS), "loss")
        if abs(losses[0] - LN_2) > 1e-3 or losses[-1] >= losses[0]:
            raise Wrong(f"losses {losses}")

    return {"DPO": _cell(train)}


def ppo(bench: Bench) -> dict[str, str]:
    """The one update of an iteration sees the probabilities that the answers were sampled with."""
    import ppo_training

    reward = bench.folder / "reward.py"
    reward.write_text("def score(prompts, completions):\n    return [float(len(c)) for c in completions]\n")

    def train() -> None:
        flags = (
            "--train_file_dir", str(bench.folder / "sft.jsonl"), "--reward_function",
            f"{reward}:score", "--max_new_tokens", "8", "--max_steps", "1", "--num_ppo_epochs", "1",
            "--per_device_train_batch_size", "4",
        )  # fmt: skip
        ratio = _logs(bench.run(ppo_training.main, "ppo", *flags, *LORA), "policy/ratio")[0]
        if abs(ratio - 1) > 1e-4:
            raise Wrong(f"the first ratio is {ratio:.4f}")

    return {"PPO": _cell(train)}


COLUMNS = ("LoRA all", "merge", "full", "stops", "packed", "RM", "DPO", "PPO")


def measure(name: str) -> dict[str, str]:
    """Of a name of ARCHITECTURES, a cell for each of COLUMNS: WORKS, the message that refuses, or what is wrong.

    A cell is missing where the one before it did not work.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = _cell(lambda: save_model(name, Path(folder)))
        if made != WORKS:
            return dict.fromkeys(COLUMNS, made)
        bench, cells = Bench(Path(folder) / name.replace(" ", "-"), Path(folder)), {}
        for column in (lora_and_merge, full_and_stop, packed, reward_model, dpo, ppo):
            cells |= column(bench)
    cells = {column: cell.replace(f"{folder}/", "") for column, cell in cells.items()}
    print(name, cells, file=sys.stderr, flush=True)
    return cells


def _cell(run: Callable[[], object]) -> str:
    said = io.StringIO()
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(said), redirect_stderr(said):
            run()
    except InputError as error:
        return str(error)
    except (Wrong, TrainingDiverged) as error:
        return f"wrong: {error}"
    except SystemExit as error:
        return f"exit {error.code}: {said.getvalue().strip()[-300:]}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"traceback: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
    finally:
        logging.disable(logging.NOTSET)
    return WORKS
