"""docs/reliability.md: every command that is to prove something names tests that are there."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = re.findall(r"`python -m (pytest [^`]+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))


def test_every_promise_has_a_command():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| promise")]
    assert len(rows) > 12
    for row in rows:
        assert "`python -m pytest" in row or row.endswith("| the same |"), row


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tests_of_a_command_exist(command):
    words = shlex.split(command)[1:]
    keywords = words.pop().split(" or ") if "-k" in words else []
    files = [ROOT / word for word in words if word != "-k"]
    names = [name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.M)]
    for keyword in keywords or ["test_"]:
        assert any(keyword in name for name in names), keyword
