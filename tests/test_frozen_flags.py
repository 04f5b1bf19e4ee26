"""The flags of the scripts are frozen: people have them in their shell scripts."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "frozen_flags"


@pytest.mark.parametrize("name", ["shared", "pt", "sft", "rm", "ppo", "dpo"])
def test_flags_are_the_frozen_ones(name):
    flags = runpy.run_path(str(FOLDER / "update.py"))["stage_flags"]()[name]
    assert flags == (FOLDER / f"{name}.txt").read_text().split(), "run `make frozen-flags` if the change is meant"
