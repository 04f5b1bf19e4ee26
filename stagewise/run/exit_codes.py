"""How scripts start and end: 0 done, 2 what the user can mend, 1 anything else, 130/143 interrupted."""

import argparse
import atexit
import contextlib
import difflib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable

from stagewise.errors import InputError, ProcessLost, SaveFailed, TrainingDiverged
from template import TemplateError

# What allocators say that have no exception of their own: torch on CPU, the CUDA driver, cuBLAS.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def run_script(main: Callable[[], object]) -> None:
    """Call a script's main; an InputError becomes a message without a traceback and exit code 2.

    A failure of any other kind keeps its traceback (exit code 1), and where memory ran out advice follows it; 130 and
    143 are raised where the signal was handled.

    A process that was in a group ends at once after its last word, see _LastWord. A group that the caller has formed
    stays, and so does a caller that is no script.
    """
    last_word, of_caller = _LastWord(), _in_group()
    is_script = sys._getframe(1).f_globals.get("__name__") == "__main__"
    if is_script:
        atexit.register(last_word)  # the first to register is the last to be called
    code = 1
    try:
        _run(main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if _in_group() and not of_caller:
            last_word.code = code
            # one that failed must not wait for the others
            if code in (0, 130, 143) or not is_script:
                sys.modules["torch"].distributed.destroy_process_group()


class _LastWord:
    """Ends the process with `code`, where there is one, without taking its interpreter down.

    Threads of a process group outlive it: torch.distributed.destroy_process_group leaves those of gloo running where a
    library still holds the group, which DDP and DeepSpeed do. Such a thread frees the tensors of the last collective,
    for which it needs the interpreter's lock; one that is refused it, because the interpreter is ending, is ended by
    force, and the process with it: "terminate called without an active exception", SIGABRT, of a run that was done.
    """

    code: int | None = None

    def __call__(self) -> None:
        if self.code is not None:
            logging.shutdown()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # nobody listens any more
                    stream.flush()
            os._exit(self.code)


def _run(main: Callable[[], object]) -> None:
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # huggingface_hub and trl report their use otherwise
    _quiet_libraries()
    try:
        main()
    except (InputError, TemplateError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (TrainingDiverged, SaveFailed, ProcessLost) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.print_exc()
        _explain_shortage(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, of an accelerator or of the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(text in str(error) for text in OUT_OF_MEMORY)


def _explain_shortage(error: BaseException) -> None:
    """Below the traceback: what the run was estimated to need, and which flags would make it need less."""
    if "stagewise.run.memory" in sys.modules:  # not in scripts that train nothing
        from stagewise.run.out_of_memory import explain

        print(f"\nerror: {explain(error)}", file=sys.stderr)


class ScriptParser(argparse.ArgumentParser):
    """argparse for scripts that train nothing: no shortened flags, and an unknown one names the nearest there is."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        found, unknown = self.parse_known_args(args, namespace)
        for token in unknown:
            flag = token.partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            near = difflib.get_close_matches(flag, known, n=1)
            self.error(f"{flag}: " + (f"did you mean {near[0]}?" if near else "unknown; --help lists what there is"))
        return found


def boolean(text: str) -> bool:
    """A switch with a value, for scripts on plain argparse: --flag, --flag True, --flag False."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")
    return text.lower() in ("true", "1", "yes")


def _quiet_libraries() -> None:
    """Silence what libraries say at every start and no user can act on; called before they are imported."""
    # an optional kernel for 4-bit inference on CPU
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # DeepSpeed, imported by accelerate's look-around, on a machine without an accelerator
    logging.getLogger("DeepSpeed").addFilter(lambda record: "unable to detect it" not in record.getMessage())
    # a language model that becomes a reward model, or is the base of one, has no score head: that is expected
    logging.getLogger("transformers.modeling_utils").addFilter(lambda record: not _misses_score_head_alone(record))
    # DeepSpeed calls what torch is about to rename
    warnings.filterwarnings("ignore", message=".*torch.distributed.all_gather_into_tensor", category=FutureWarning)
    # peft reads a name that transformers renamed
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def _misses_score_head_alone(record: logging.LogRecord) -> bool:
    """Whether the report of a loaded checkpoint names no other weights than the head that a reward model replaces."""
    rows = re.findall(r"^(\S+)\s+\|.*(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", record.getMessage(), flags=re.M)
    return ("score.weight", "MISSING") in rows and {*rows} <= {
        ("score.weight", "MISSING"),
        ("lm_head.weight", "UNEXPECTED"),
    }


def _in_group() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
