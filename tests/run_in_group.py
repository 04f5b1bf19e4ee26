"""Several runs in one process group, so that libraries are loaded once: torchrun ... run_in_group.py jobs.json

jobs.json: [{"script": "supervised_finetuning", "argv": [...]}, ...]. They run after one another; a failing one ends
the group. With "trains_from": N, rows of fewer than N tokens train nothing (SFT).
"""

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path


def main(path: str) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    if os.environ.get("FSDP_ON_CPU"):
        allow_fsdp_on_cpu()
    for job in json.loads(Path(path).read_text()):
        # what accelerate and transformers keep for the life of a process: the engine, and its settings
        AcceleratorState._reset_state()
        if os.environ.get("FSDP_ON_CPU"):
            PartialState._reset_state()
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        with rows_trained_from(job.get("trains_from", 0)):
            importlib.import_module(job["script"]).main(job["argv"])
        engine, stage = AcceleratorState().distributed_type.value, 3 if is_deepspeed_zero3_enabled() else 2
        engine += f" {stage}" * (engine == "DEEPSPEED")
        # in one piece, or the lines of two processes run into each other
        sys.stdout.write(f"engine of {job['script']}: {engine}\n")
        sys.stdout.flush()


@contextlib.contextmanager
def rows_trained_from(length: int) -> Iterator[None]:
    """No row of the data files is read without a trained token; here those below this length lose all of theirs."""
    from stagewise.data import collators

    labels = collators._labels
    collators._labels = lambda row: labels(row).clone().fill_(-100) if len(row["input_ids"]) < length else labels(row)
    try:
        yield
    finally:
        collators._labels = labels


def allow_fsdp_on_cpu() -> None:
    """accelerate knows FSDP for accelerators only, although torch's own runs on gloo; let this one case through."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    import stagewise.distributed

    stagewise.distributed._check_fsdp = lambda args: None
    begin = AcceleratorState.__init__

    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":  # as it does on accelerators
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":
    from stagewise.run.exit_codes import run_script

    run_script(lambda: main(sys.argv[1]))
