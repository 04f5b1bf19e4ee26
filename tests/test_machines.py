"""Two machines (two torchrun agents at the loopback address) on one output_dir, and on one of their own each."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from stagewise.checkpoint_files import MANIFEST, PARTIAL, saving
from stagewise.errors import InputError, SaveFailed
from stagewise.machines import Machines, _put, writers_of
from stagewise.run import lifecycle
from stagewise.run.checkpoints import checkpoint_problem
from stagewise.run.lineage import missing_random_state
from tests.endings import ENGINES, free_port
from tests.stages import LORA, assert_same_weights, losses

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"shared": ("ddp", "zero2"), "own": ("ddp", "zero3")}
MACHINES = (0, 1)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request, tiny_model_dir, sft_file, preference_file, tmp_path_factory) -> tuple[str, list[Path]]:
    """Its name, and the folder of each machine: for each engine four steps, and two resumed from the second."""
    name = request.param
    root = tmp_path_factory.mktemp(name)
    folders = [root / f"machine{machine}" for machine in MACHINES]
    if name == "shared":  # under another path on the second
        folders[0].mkdir()
        folders[1].symlink_to(folders[0])
    command = [
        "--model_name_or_path", tiny_model_dir, "--train_file_dir", sft_file, "--template_name", "chatml",
        "--model_max_length", "128", "--do_train", "True", "--max_steps", "4", "--save_steps", "1",
        "--logging_steps", "1", "--learning_rate", "5e-3", "--per_device_train_batch_size", "2", "--report_to", "none",
        "--ddp_timeout", "120", "--save_on_each_node", str(name == "own"), *LORA,
    ]  # fmt: skip

    def jobs(machine: int) -> list[dict]:
        argvs = []
        for engine in LAYOUTS[name]:
            whole, resumed = folders[machine] / engine / "whole", folders[machine] / engine / "resumed"
            argvs += [
                [*command, *ENGINES[engine], "--output_dir", str(whole)],
                [*command, *ENGINES[engine], "--output_dir", str(resumed), "--save_total_limit", "1",
                 "--resume_from_checkpoint", str(whole / "checkpoint-2")],
            ]  # fmt: skip
        found = [{"script": "supervised_finetuning", "argv": argv} for argv in argvs]
        if name == "own":  # DPO has its own kind of arguments
            argv = [*command, "--train_file_dir", preference_file, "--max_steps", "2"]
            # before DeepSpeed, which leaves variables of its own in the environment
            found.insert(0, {"script": "dpo_training", "argv": [*argv, "--output_dir", str(folders[machine] / "dpo")]})
        return found

    port = str(free_port())
    agents = []
    for machine in MACHINES:
        (root / f"jobs{machine}.json").write_text(json.dumps(jobs(machine)))
        launch = ["--nnodes", "2", "--node_rank", str(machine), "--nproc_per_node", "1"]
        launch += ["--master_addr", "127.0.0.1", "--master_port", port]
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launch, "tests/run_in_group.py",
                 str(root / f"jobs{machine}.json")],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            )
        )  # fmt: skip
    for agent in agents:
        said, _ = agent.communicate(timeout=300)
        assert agent.returncode == 0, said[-6000:]
    return name, folders


def test_every_checkpoint_is_whole_on_every_machine(layout):
    name, folders = layout
    for engine in LAYOUTS[name]:
        for machine, folder in enumerate(folders):
            whole = folder / engine / "whole"
            assert sorted(path.name for path in whole.glob("checkpoint*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
            assert not list(whole.glob(".*"))
            assert not (whole / PARTIAL).exists()
            for checkpoint in whole.glob("checkpoint-*"):
                assert checkpoint_problem(checkpoint) is None
                states = {f"rng_state_{number}.pth" for number in (MACHINES if name == "shared" else (machine,))}
                listed = json.loads((checkpoint / MANIFEST).read_text())["files"].keys()
                assert {path for path in listed if path.startswith("rng_state")} == states
            # rotated on each machine
            assert [path.name for path in (folder / engine / "resumed").glob("checkpoint*")] == ["checkpoint-4"]


def test_dpo_saves_on_every_machine_too(layout):
    name, folders = layout
    for folder in folders if name == "own" else ():
        assert [path.name for path in sorted((folder / "dpo").glob("checkpoint*"))] == ["checkpoint-1", "checkpoint-2"]
        assert all(checkpoint_problem(path) is None for path in (folder / "dpo").glob("checkpoint-*"))


def test_every_machine_has_the_result(layout):
    name, folders = layout
    for engine in LAYOUTS[name]:
        first, second = (folder / engine / "whole" for folder in folders)
        names = {path.name for path in first.iterdir()}
        assert {"adapter_model.safetensors", "stage.json", "run_config.yaml", "trainer_state.json"} <= names
        assert "README.md" in names
        assert names == {path.name for path in second.iterdir()}
        assert losses(first) == losses(second)
        assert_same_weights(first, second, rtol=0, atol=0)


def test_a_run_resumed_on_both_machines_is_an_uninterrupted_one(layout):
    name, folders = layout
    for engine in LAYOUTS[name]:
        for folder in folders:
            whole, resumed = folder / engine / "whole", folder / engine / "resumed"
            assert len(losses(whole)) == 4
            assert losses(whole) == losses(resumed)
            assert_same_weights(whole, resumed, rtol=0, atol=0)


# --- what machines see -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "writers"),
    [
        ([{0}, {0}], [0, 0]),  # one machine of two processes
        ([{0, 2}, {0, 2}, {0, 2}, {0, 2}], [0, 0, 0, 0]),  # two machines on one folder
        ([{0}, {0}, {2}, {2}], [0, 0, 2, 2]),  # with a folder each
        ([{0, 2}, {1}, {0, 2}], [0, 1, 0]),  # two of three share one
        ([{0, 1}, {1}], None),  # the second does not see the first: yet
        ([{0}, set()], None),
    ],
)
def test_the_lowest_process_that_sees_a_folder_keeps_it(seen, writers):
    assert writers_of([frozenset(each) for each in seen]) == writers


def test_a_machine_that_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    made: list[Path] = []
    assert "file/out: cannot be written on" in _put(tmp_path / "file" / "out" / "probe", made)
    assert not made


class TwoFolders(Machines):
    """Asks as if two machines had these output_dirs."""

    def __init__(self, args, *folders: Path):
        super().__init__(0, (0, 1), True)
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "folders", folders)

    def ask(self, decide):
        found = []
        for folder in self.folders:
            self.args.output_dir = str(folder)
            found.append(decide())
        return found


def checkpoints(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        for name in ("scheduler.pt", "optimizer.pt", "rng_state_0.pth", "model.safetensors"):
            (folder / f"checkpoint-{step}" / name).touch()
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def agreed(first: Path, second: Path, resume: str | None = "True") -> str | None:
    args = SimpleNamespace(resume_from_checkpoint=resume)
    args.machines = TwoFolders(args, first, second)
    return lifecycle._agree_on_checkpoint(args, SimpleNamespace(overwrite_output_dir=False))


def test_the_newest_checkpoint_that_both_have(tmp_path):
    """One machine was killed before it had its own copy of the last, the other had lost one before."""
    first, second = checkpoints(tmp_path / "a", 2, 3, 4), checkpoints(tmp_path / "b", 1, 2, 3)
    (first / "checkpoint-3" / "optimizer.pt").unlink()
    assert agreed(first, second) == str(second / "checkpoint-2")
    with pytest.raises(InputError, match="no whole checkpoint in .* that every machine has"):
        agreed(checkpoints(tmp_path / "c", 3), checkpoints(tmp_path / "d", 2))
    assert agreed(tmp_path / "new", tmp_path / "other", None) is None


def test_a_copy_of_another_machine(tmp_path):
    checkpoint = checkpoints(tmp_path, 2) / "checkpoint-2"
    (checkpoint / "stage.json").write_text(json.dumps({"layout": {"processes": 2}}))
    args = [SimpleNamespace(process_index=rank, world_size=2) for rank in range(2)]
    assert missing_random_state(str(checkpoint), args[0]) is None
    assert "rng_state_1.pth is not on" in missing_random_state(str(checkpoint), args[1])


@pytest.mark.parametrize(
    ("error", "says", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left.*MiB were free", "Make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota exceeded.*MiB were free", "Make room"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "x/rng.pth"),
            "No such file.*'x/rng.pth'",
            "Mend",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "Permission denied: 'x'", "Mend"),
    ],
)
def test_a_failed_save_says_what_failed(error, says, advice, tmp_path):
    with pytest.raises(SaveFailed, match=f"checkpoint-1 could not be saved: .*{says}.*{advice}"):  # noqa: SIM117
        with saving("checkpoint-1", tmp_path):
            raise error
