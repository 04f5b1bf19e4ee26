"""Several runs in one process group, so that libraries are loaded once: torchrun ... run_in_group.py jobs.json

jobs.json: [{"script": "supervised_finetuning", "argv": [...]}, ...]. Runs after one another; a failing one ends the group.
"""

import importlib
import json
import sys
from pathlib import Path


def main(path: str) -> None:
    from accelerate.state import AcceleratorState, GradientState

    for job in json.loads(Path(path).read_text()):
        # what accelerate keeps for the life of a process: the engine, and its settings
        AcceleratorState._reset_state()
        GradientState._reset_state()
        importlib.import_module(job["script"]).main(job["argv"])


if __name__ == "__main__":
    from stagewise.run.exit_codes import run_script

    run_script(lambda: main(sys.argv[1]))
