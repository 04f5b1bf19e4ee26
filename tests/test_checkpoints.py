"""A checkpoint is complete or not there, whatever ends the run that writes it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stagewise.checkpoint_files import MANIFEST, PARTIAL, manifest_problem, publish, seal
from stagewise.errors import SaveFailed
from stagewise.run.checkpoints import checkpoint_problem, find_resume_checkpoint
from tests.stages import FULL, LORA, assert_same_weights, losses, run_sft

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("--max_steps", "4", "--save_steps", "2", "--do_train", "True")


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir, sft_file, tmp_path_factory) -> Path:
    """Four steps of SFT with checkpoints after the second and the fourth."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run_sft(tiny_model_dir, sft_file, folder, *LORA, *STEPS)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_manifest_names_every_file(run_dir):
    checkpoint = run_dir / "checkpoint-4"
    entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert sorted([*entries, MANIFEST]) == files(checkpoint)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "stage.json"} <= entries.keys()
    assert not (run_dir / PARTIAL).exists()


@pytest.mark.parametrize("damage", ["truncated", "changed", "deleted"])
def test_damage_to_any_file_is_found_and_passed_over(damage, run_dir, tmp_path, caplog):
    """Each file of the newest checkpoint in turn; then the one before it is taken, and the log says why."""
    for name in files(run_dir / "checkpoint-4"):
        folder = tmp_path / name.replace("/", "-")
        for step in (2, 4):
            shutil.copytree(run_dir / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        victim = folder / "checkpoint-4" / name
        content = victim.read_bytes()
        if damage == "deleted":
            if name == MANIFEST:  # then it is a checkpoint of somebody else's, which may well be whole
                continue
            victim.unlink()
        elif damage == "truncated":
            victim.write_bytes(content[: len(content) // 2])
        else:
            victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        if damage == "changed" and name == MANIFEST:
            continue  # its last byte is a line end
        caplog.clear()
        assert find_resume_checkpoint("True", str(folder)) == str(folder / "checkpoint-2"), name
        assert name in caplog.text


def test_a_resume_goes_back_one_checkpoint(run_dir, tiny_model_dir, sft_file, tmp_path, capsys):
    """Each file of the newest checkpoint in turn cut short: the run goes on from the one before, says so, and ends
    where it would have ended.
    """
    for name in files(run_dir / "checkpoint-4"):
        broken = tmp_path / name.replace("/", "-")
        for step in (2, 4):
            shutil.copytree(run_dir / f"checkpoint-{step}", broken / f"checkpoint-{step}")
        victim = broken / "checkpoint-4" / name
        victim.write_bytes(victim.read_bytes()[:-10])
        capsys.readouterr()
        run_sft(tiny_model_dir, sft_file, broken, *LORA, *STEPS, "--resume_from_checkpoint", "True")
        said = capsys.readouterr().out
        assert f"passing over {broken / 'checkpoint-4'}: {name}" in said
        assert "step 3/4" in said
        assert "step 2/4" not in said
        assert losses(broken) == losses(run_dir)
        assert_same_weights(run_dir, broken, rtol=0, atol=0)
        assert checkpoint_problem(broken / "checkpoint-4") is None  # written anew


def test_sealed_and_published(tmp_path):
    partial, final = tmp_path / "beside" / "checkpoint-1", tmp_path / "checkpoint-1"
    (partial / "inner").mkdir(parents=True)
    (partial / "a.bin").write_bytes(b"12345")
    (partial / "inner" / "b.bin").write_bytes(b"")
    seal(partial)
    final.mkdir()
    (final / "old.bin").write_bytes(b"of an earlier start")
    publish(partial, final)
    assert files(final) == ["a.bin", "inner/b.bin", MANIFEST]
    assert manifest_problem(final) is None
    (final / "a.bin").write_bytes(b"12346")
    assert manifest_problem(final) == "a.bin is not what was written (its hash differs)"
    (final / "a.bin").write_bytes(b"123")
    assert manifest_problem(final) == "a.bin has 3 bytes, and 5 were written"


def test_what_a_killed_save_leaves_is_in_nobodys_way(run_dir, tiny_model_dir, sft_file, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(run_dir / "checkpoint-2", folder / "checkpoint-2")
    shutil.copytree(run_dir / "checkpoint-4", folder / PARTIAL / "checkpoint-4")
    (folder / PARTIAL / "checkpoint-4" / MANIFEST).unlink()
    assert find_resume_checkpoint("True", str(folder)) == str(folder / "checkpoint-2")
    run_sft(tiny_model_dir, sft_file, folder, *LORA, *STEPS, "--resume_from_checkpoint", "True")
    assert not (folder / PARTIAL).exists()
    assert losses(folder) == losses(run_dir)


def test_a_save_that_fails_stops_the_run(tiny_model_dir, sft_file, tmp_path, monkeypatch):
    """The error of a full disk, from the writer of weights; the checkpoint before is untouched."""
    from transformers import Trainer

    save = Trainer.save_model

    def full(self, output_dir=None, _internal_call=False):
        if self.state.global_step > 2:
            raise OSError(28, "No space left on device")
        return save(self, output_dir, _internal_call)

    monkeypatch.setattr(Trainer, "save_model", full)
    with pytest.raises(SaveFailed, match="checkpoint-4 could not be saved: .*No space left.*--resume_from_checkpoint"):
        run_sft(tiny_model_dir, sft_file, tmp_path / "out", *LORA, *STEPS)
    assert checkpoint_problem(tmp_path / "out" / "checkpoint-2") is None
    assert not (tmp_path / "out" / PARTIAL).exists()
    assert not (tmp_path / "out" / "checkpoint-4").exists()


UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
# A file system of so many bytes, a run that fills it, what is left, and the way on when there is room.
FILL_UP = """
set -u
mount -t tmpfs -o size=$ROOM none "$DISK"
"$@" --output_dir "$DISK/out"
echo "ended with $?"
ls "$DISK/out"
mount -o remount,size=1g "$DISK"
"$@" --output_dir "$DISK/out" --resume_from_checkpoint True
echo "resumed with $?"
cp "$DISK"/out/*.safetensors "$DISK"/out/trainer_state.json "$KEPT"
"""


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def whole_run(tiny_model_dir, sft_file, tmp_path_factory) -> tuple[list[str], Path]:
    """A command that saves after every second of 8 steps, without its output_dir, and what it makes with room."""
    import supervised_finetuning

    folder = tmp_path_factory.mktemp("whole") / "out"
    argv = [
        "--model_name_or_path", tiny_model_dir, "--train_file_dir", sft_file, "--template_name", "chatml",
        "--model_max_length", "128", "--per_device_train_batch_size", "4", "--logging_steps", "1", "--learning_rate",
        "5e-3", *FULL, *STEPS, "--max_steps", "8",
    ]  # fmt: skip
    supervised_finetuning.main([*argv, "--output_dir", str(folder)])
    return argv, folder


@pytest.mark.skipif(not can_mount(), reason="needs a user namespace with mounts")
@pytest.mark.parametrize(
    ("checkpoints", "what", "last"),
    [(2.5, "checkpoint-6", "checkpoint-4"), (4.1, "the trained model", "checkpoint-8")],
    ids=["checkpoint", "model"],
)
def test_a_full_disk(checkpoints, what, last, whole_run, tmp_path):
    """Room for so many checkpoints: the run ends where the next write fails, and goes on from the last when there is
    room."""
    argv, whole = whole_run
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    for folder in (disk, kept):
        folder.mkdir()
    of_one = sum(path.stat().st_size for path in (whole / "checkpoint-4").rglob("*") if path.is_file())
    env = {
        **os.environ, "DISK": str(disk), "KEPT": str(kept), "PYTHONPATH": str(ROOT),
        "ROOM": str(round(checkpoints * of_one)),
    }  # fmt: skip
    done = subprocess.run(
        [*UNSHARE, "bash", "-c", FILL_UP, "fill", sys.executable, "supervised_finetuning.py", *argv],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    told = done.stdout + done.stderr
    assert "ended with 1" in told, told[-3000:]
    assert f"error: {what} could not be saved: " in done.stderr
    assert "No space left" in done.stderr or "(0.0 MiB were free in" in done.stderr
    assert "Traceback" not in done.stderr
    left = done.stdout.split("ended with 1")[1].split("resumed with")[0]
    assert f"\n{last}\n" in left
    assert PARTIAL not in left
    assert "model.safetensors" not in left
    assert "resumed with 0" in told, told[-3000:]
    assert losses(kept) == losses(whole)
    assert_same_weights(whole, kept, rtol=0, atol=0)


def test_uploads_are_of_finished_folders(tiny_model_dir, sft_file, tmp_path, monkeypatch):
    """--push_to_hub with a hub that notes what it is given: whole checkpoints, and the model with its card."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    uploads = []

    class Done:
        @staticmethod
        def done() -> bool:
            return True

        exception = result = done

    class Hub:
        @staticmethod
        def create_repo(repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id, url=f"hub/{repo_id}")

        @staticmethod
        def upload_folder(folder_path, ignore_patterns=(), **kwargs):
            uploads.append((Path(folder_path).name, files(Path(folder_path))))
            return Done()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    flags = ("--push_to_hub", "True", "--hub_model_id", "me/model", "--hub_strategy", "all_checkpoints")
    run_sft(tiny_model_dir, sft_file, tmp_path / "out", *LORA, *STEPS, *flags)
    names = [name for name, _ in uploads]
    assert names == ["out", "checkpoint-2", "out", "checkpoint-4", "out"]
    assert all(MANIFEST in found for name, found in uploads if name != "out")
    assert "adapter_model.safetensors" in uploads[-1][1]
    assert "# out" in (tmp_path / "out" / "README.md").read_text()
    assert "README.md" in uploads[-1][1]
