"""Models and adapters of somebody else's: nothing of theirs runs, and nothing outside of their folder is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stagewise.errors import InputError
from tests.stages import LORA, run_pt, run_rm, run_sft

ONE_STEP = ("--max_steps", "1", "--do_train", "True", "--report_to", "none", "--save_strategy", "no")
# What a pickle that is loaded without care does: here, make a file.
TRAP = "trap.txt"


class Trap:
    def __reduce__(self):
        return (open, (TRAP, "w"))


@pytest.fixture(scope="module")
def adapter(tiny_model_dir, text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "adapter"
    run_pt(tiny_model_dir, text_file, folder, *LORA, *ONE_STEP)
    return folder


@pytest.fixture(scope="module")
def scorer(tiny_model_dir, preference_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "scorer"
    run_rm(tiny_model_dir, preference_file, folder, *LORA, *ONE_STEP)
    return folder


def pickled_adapter(adapter: Path) -> None:
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()


def entry(name: str, value: object):
    def put(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))

    return put


def link_out(adapter: Path) -> None:
    secret = adapter.parent / "secret.safetensors"
    shutil.move(adapter / "adapter_model.safetensors", secret)
    (adapter / "adapter_model.safetensors").symlink_to(secret)


TRICKS = {
    "pickle": (pickled_adapter, "the weights are pickled \\(adapter_model.bin\\).*--allow_pickle True"),
    "link": (link_out, "adapter_model.safetensors is a link to .*secret.safetensors, outside of it"),
    "imports": (entry("auto_mapping", {"parent_library": "os"}), "auto_mapping in adapter_config.json names Python"),
    "imports by a name like it": (
        entry("auto_mapping", {"parent_library": "transformers_models.x"}),
        "auto_mapping in adapter_config.json names",
    ),
    "megatron": (entry("megatron_config", {"a": 1}), "megatron_config in adapter_config.json has Python modules"),
    "unpickles": (entry("corda_config", {"cache_file": "/tmp/x"}), "corda_config in adapter_config.json names files"),
}


@pytest.fixture(params=TRICKS)
def bad_adapter(request, adapter, tmp_path) -> tuple[str, str]:
    """A folder with one trick in it, and the message that refuses it."""
    play, message = TRICKS[request.param]
    folder = tmp_path / "bad"
    shutil.copytree(adapter, folder)
    play(folder)
    return str(folder), message


def merge(base: str, adapter: str, output: Path, *flags: str) -> dict:
    import merge_peft_adapter

    return merge_peft_adapter.main(
        ["--base_model", base, "--lora_model", adapter, "--output_dir", str(output), *flags]
    )


def ask(model: str, *flags: str) -> None:
    import inference

    inference.main(
        ["--model_name_or_path", model, "--prompt", "h", "--max_new_tokens", "2", "--template_name", "chatml", *flags]
    )


def test_tricks_of_adapters_are_refused_everywhere(bad_adapter, tiny_model_dir, sft_file, tmp_path):
    folder, message = bad_adapter
    with pytest.raises(InputError, match=f"^--lora_model .*{message}"):
        merge(tiny_model_dir, folder, tmp_path / "merged")
    with pytest.raises(InputError, match=f"^--lora_model .*{message}"):
        ask(tiny_model_dir, "--lora_model", folder)
    with pytest.raises(InputError, match=f"^--model_name_or_path .*{message}"):
        ask(folder)
    with pytest.raises(InputError, match=f"^--peft_path .*{message}"):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", "--peft_path", folder)
    assert not (tmp_path / "merged").exists()
    assert not (tmp_path / "out").exists()


def test_tricks_of_reward_adapters_are_refused(scorer, tiny_model_dir, tmp_path):
    import ppo_training

    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(8)))
    for name, (play, message) in TRICKS.items():
        folder = tmp_path / name
        shutil.copytree(scorer, folder)
        play(folder)
        with pytest.raises(InputError, match=f"^--reward_model_path .*{message}"):
            ppo_training.main(
                ["--model_name_or_path", tiny_model_dir, "--train_file_dir", str(tmp_path / "prompts.jsonl"),
                 "--reward_model_path", str(folder), "--template_name", "chatml", "--output_dir",
                 str(tmp_path / "out"), "--max_new_tokens", "4", "--dry_run", "True"]
            )  # fmt: skip


def test_links_within_the_hubs_cache_are_fine(adapter, tiny_model_dir, tmp_path):
    """models--me--a/snapshots/COMMIT/file -> ../../blobs/HASH, as huggingface_hub lays it out."""
    cache = tmp_path / "models--me--a"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(path for path in adapter.iterdir() if path.is_file()):
        shutil.copy(path, cache / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert merge(tiny_model_dir, str(snapshot), tmp_path / "merged")["saved"]["top1_agreement"] == 1.0


def test_a_base_that_only_the_adapter_names(adapter, tiny_model_dir, tmp_path):
    ask(str(adapter))
    with pytest.raises(InputError, match=f"--trust_remote_code would run the code of {tiny_model_dir}"):
        ask(str(adapter), "--trust_remote_code", "True")
    for base, message in (("../../elsewhere", r"a path with \.\. "), (None, "names no base model")):
        folder = tmp_path / str(base).replace("/", "")
        shutil.copytree(adapter, folder)
        entry("base_model_name_or_path", base)(folder)
        with pytest.raises(InputError, match=message):
            ask(str(folder))


def saved_as_pickle(model: str, folder: Path, trapped: bool) -> str:
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    torch.save(Trap() if trapped else weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_pickled_weights(tiny_model_dir, text_file, adapter, tmp_path, monkeypatch):
    """Refused; with --allow_pickle True read, but never so that what they hold could run."""
    monkeypatch.chdir(tmp_path)
    good = saved_as_pickle(tiny_model_dir, tmp_path / "good", trapped=False)
    bad = saved_as_pickle(tiny_model_dir, tmp_path / "bad", trapped=True)
    torch.load(Path(bad, "pytorch_model.bin"), weights_only=False).close()
    assert Path(TRAP).is_file()  # so the trap works
    Path(TRAP).unlink()
    for model in (good, bad):
        with pytest.raises(InputError, match="the weights are pickled .pytorch_model.bin.*--allow_pickle True"):
            run_pt(model, text_file, tmp_path / "out", *LORA, *ONE_STEP)
        with pytest.raises(InputError, match="the weights are pickled"):
            merge(model, str(adapter), tmp_path / "merged")
        with pytest.raises(InputError, match="the weights are pickled"):
            ask(model)
    allowed = ("--allow_pickle", "True")
    with pytest.raises(InputError, match="--model_name_or_path .*its pickle holds more than weights.*io.open"):
        run_pt(bad, text_file, tmp_path / "out", *LORA, *ONE_STEP, *allowed)
    with pytest.raises(InputError, match="its pickle holds more than weights"):
        ask(bad, *allowed)
    assert not Path(TRAP).exists()
    run_pt(good, text_file, tmp_path / "pt", *LORA, *ONE_STEP, *allowed)
    merge(good, str(adapter), tmp_path / "merged", *allowed)
    ask(good, *allowed)
    pickled = tmp_path / "pickled"
    shutil.copytree(adapter, pickled)
    pickled_adapter(pickled)
    merge(tiny_model_dir, str(pickled), tmp_path / "merged2", *allowed)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "merged2"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shard", ["../elsewhere.safetensors", "/elsewhere.safetensors", "..", 7])
def test_shards_lie_beside_their_index(shard, tiny_model_dir, text_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    shutil.move(model / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}})
    )
    with pytest.raises(InputError, match="names the shard .*which is no file beside it"):
        run_pt(str(model), text_file, tmp_path / "out", *LORA, *ONE_STEP)


@pytest.mark.parametrize("setting", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_brings_no_kernel(setting, tiny_model_dir, text_file, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: "somebody/kernel"}))
    for use in (lambda: run_pt(str(model), text_file, tmp_path / "out", *LORA, *ONE_STEP), lambda: ask(str(model))):
        with pytest.raises(InputError, match="asks for the kernel somebody/kernel, which would be downloaded and run"):
            use()


def test_code_of_a_model_is_not_run(tiny_model_dir, text_file, adapter, tmp_path, monkeypatch):
    """A configuration with Python code of its own; the code makes a file when it is imported."""
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / TRAP)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    for use in (
        lambda: run_pt(str(model), text_file, tmp_path / "out", *LORA, *ONE_STEP),
        lambda: merge(str(model), str(adapter), tmp_path / "merged"),
        lambda: ask(str(model)),
    ):
        with pytest.raises(InputError, match="trust_remote_code"):
            use()
    assert not Path(TRAP).exists()


def test_code_that_is_copied_is_the_models_own(tiny_model_dir, adapter, tmp_path):
    """The .py files of a base travel into the merged folder, and what they link to would with them."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    (tmp_path / "id_rsa").write_text("secret")
    (model / "modeling.py").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(InputError, match="modeling.py is a link to .*id_rsa"):
        merge(str(model), str(adapter), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
