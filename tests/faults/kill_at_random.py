"""A run of one stage that is killed at random and gone on with: python tests/faults/kill_at_random.py job.json

job.json: {"script": name of a stage's module, "argv": its flags without output_dir, "folder": where to work,
"kills": 20, "seed": 0}. Trains into folder/whole without a disturbance and into folder/killed with them, and prints
JSON: what was in folder/killed at each kill, and how many seconds the undisturbed run took.

Each start is a fork of this process, which has loaded the libraries and computed nothing: it takes a second, not ten.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def start(script: str, argv: list[str], log: Path) -> int:
    """The process id of a run."""
    child = os.fork()
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.argv = [f"{script}.py", *argv]
    from stagewise.run.exit_codes import run_script

    try:
        run_script(importlib.import_module(script).main)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def ended(child: int) -> int | None:
    """The exit status of a process, None while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return None if found == 0 else os.waitstatus_to_exitcode(status)


def main(path: str) -> None:
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    folder, script = Path(job["folder"]), job["script"]
    importlib.import_module(script)
    for module in ("torch", "transformers", "peft", "trl", "datasets", "stagewise.run.lifecycle"):
        importlib.import_module(module)

    def argv(name: str) -> list[str]:
        return [*job["argv"], "--output_dir", str(folder / name)]

    began = time.monotonic()
    child = start(script, argv("whole"), folder / "whole.log")
    _, status = os.waitpid(child, 0)
    duration = time.monotonic() - began
    if status:
        sys.exit((folder / "whole.log").read_text()[-3000:])
    dice = random.Random(job["seed"])
    output, log = folder / "killed", folder / "killed.log"
    points = []
    while len(points) < job["kills"]:
        resume = ["--resume_from_checkpoint", "True"] if any(output.glob("checkpoint-[0-9]*")) else []
        again = ["--overwrite_output_dir", "True"] if not resume else []
        deadline = time.monotonic() + dice.uniform(0, duration)
        child = start(script, [*argv("killed"), *resume, *again], log)
        status = None
        while status is None and time.monotonic() < deadline:
            time.sleep(0.002)
            status = ended(child)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            points.append(sorted(path.name for path in output.glob("checkpoint*")) if output.exists() else [])
        elif status == 0:  # it came to its end before the kill: begin anew, there are kills left
            for path in sorted(output.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
        else:
            sys.exit(f"exit code {status}\n{log.read_text()[-3000:]}")
    resume = ["--resume_from_checkpoint", "True"] if any(output.glob("checkpoint-[0-9]*")) else []
    child = start(script, [*argv("killed"), *(resume or ["--overwrite_output_dir", "True"])], log)
    if os.waitpid(child, 0)[1]:
        sys.exit(log.read_text()[-3000:])
    print(json.dumps({"points": points, "seconds": round(duration, 2)}))


if __name__ == "__main__":
    main(sys.argv[1])
