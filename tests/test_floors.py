"""The floor plan of stagewise/__init__.py, held against the imports in the code."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = {
    "stagewise.errors": -2,
    "stagewise.arguments": 0,
    "stagewise.multitask_arguments": -1,
    "stagewise.old_spellings": -1,
    "stagewise.columns": -1,
    "stagewise.distributed": -1,
    "stagewise.devices": -1,
    "stagewise.checkpoint_files": -1,
    "stagewise.machines": -1,
    "template": 0,
    "stagewise.losses": 1,
    "stagewise.data": 2,
    "stagewise.modeling": 2,
    "stagewise.trainers": 3,
    "stagewise.run": 3,
}
SCRIPTS = [path for path in ROOT.glob("*.py") if path.name != "template.py"]
# What may only be imported inside the function that needs it.
LAZY = {"bitsandbytes", "deepspeed", "flash_attn", "matplotlib", "trl", "peft", "liger_kernel"}
SHADOWED = {"datasets", "logging", "types", "tokenize", "transformers", "torch", "peft", "template_name"}


def unit(module: str) -> str | None:
    """The unit of the floor plan that a module belongs to, or None for a module of somebody else's."""
    parts = module.split(".")
    name = ".".join(parts[:2]) if parts[0] == "stagewise" and len(parts) > 1 else parts[0]
    return name if name in FLOORS else None


def imports(path: Path, top_level_only: bool = False):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield node.module, node.lineno
            if node.module == "stagewise":
                yield from ((f"stagewise.{alias.name}", node.lineno) for alias in node.names)


def modules():
    for path in sorted((ROOT / "stagewise").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield path, ".".join(p for p in parts if p != "__init__")
    yield ROOT / "template.py", "template"


def test_imports_go_down_only():
    for path, name in modules():
        mine = unit(name)
        for imported, line in imports(path):
            theirs = unit(imported)
            if theirs is None or mine is None or theirs == mine:
                continue
            assert FLOORS[theirs] < FLOORS[mine], f"{path}:{line}: {mine} imports {theirs}"


def test_losses_import_torch_and_the_standard_library_only():
    for path in (ROOT / "stagewise/losses").glob("*.py"):
        foreign = {m.split(".")[0] for m, _ in imports(path)} - {"torch", "stagewise"} - sys.stdlib_module_names
        assert not foreign, path


def test_template_imports_the_standard_library_only():
    assert all(name.split(".")[0] in sys.stdlib_module_names for name, _ in imports(ROOT / "template.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_import_no_script(script):
    names = {path.stem for path in SCRIPTS}
    assert not [m for m, _ in imports(script) if m in names]


def test_heavy_packages_are_imported_where_they_are_needed():
    for path in [*SCRIPTS, *(path for path, _ in modules())]:
        heavy = {m.split(".")[0] for m, _ in imports(path, top_level_only=True)} & LAZY
        assert not heavy, f"{path}: {heavy} at import time"


def test_no_file_shadows_a_library_and_no_sys_path_edit():
    assert not {path.stem for path in ROOT.glob("*.py")} & SHADOWED
    for path in [*SCRIPTS, *(path for path, _ in modules())]:
        assert "sys.path" not in path.read_text(encoding="utf-8"), path


def test_main_has_the_five_steps_in_every_stage():
    steps = ("# 1. arguments", "# 2. tokenizer and template", "# 3. data", "# 4. model", "# 5. trainer")
    for name in (
        "pretraining.py",
        "supervised_finetuning.py",
        "reward_modeling.py",
        "ppo_training.py",
        "dpo_training.py",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        places = [text.index(step) for step in steps]
        assert places == sorted(places)
