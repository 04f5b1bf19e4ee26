r"""Measure the table of docs/models.md, and print the page.

    python -m tests.zoo > docs/models.md
    python -m tests.zoo --models gpt2 gpt_oss        some rows, to look at

About ten seconds a model on one core; --jobs shares the models out.
"""

import argparse
import os
import re
import sys
import textwrap
from multiprocessing import get_context

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from tests.zoo.measure import COLUMNS, WORKS, measure
from tests.zoo.models import ARCHITECTURES, SHELLS, habit_of

_HEAD = """\
# Models

Printed by `python -m tests.zoo`, which trains a tiny random model of each architecture (two layers, 32 wide, float32,
on a CPU) with a tokenizer of the habit that its models come with. Nothing here is written by hand, and nothing was
run on a GPU: kernels that exist there alone (`mamba_ssm`, FlashAttention) are not in it.

| Column | A cell says "works" where |
|---|---|
| LoRA all | SFT with `--target_modules all` runs |
| merge | the merged model, read by plain transformers, is base + adapter, read by plain peft; \
it has every tensor of the base, and towers of images or sounds are as they were |
| full | SFT of all weights runs |
| stops | plain `generate()` on its result ends by itself |
| packed | the loss of packed rows is that of the same rows alone |
| RM | a reward model is trained |
| DPO | the first loss is ln 2, and then it falls |
| PPO | the first ratio of new to old probabilities is 1 |

A number is the message under the table that refuses the run; MODEL, N% and KERNEL are another word for each model.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument(
        "--models", nargs="+", choices=[*ARCHITECTURES, *SHELLS], default=[*ARCHITECTURES, *SHELLS], metavar="NAME"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with models of its own")
    args = parser.parse_args()
    with get_context("spawn").Pool(args.jobs, maxtasksperchild=8) as pool:
        rows = dict(zip(args.models, pool.imap(measure, args.models), strict=True))
    print(page(rows))
    broken = [f"{name}, {column}: {cell}" for name, row in rows.items() for column, cell in row.items() if _bad(cell)]
    print(*broken, sep="\n", file=sys.stderr)
    return 1 if broken else 0


def page(rows: dict[str, dict[str, str]]) -> str:
    """docs/models.md, as Markdown."""
    notes: dict[str, int] = {}

    def shown(name: str, cell: str | None) -> str:
        if cell is None or cell == WORKS:
            return cell or ""
        # one note for all that are refused alike
        cell = re.sub(rf"\b({re.escape(name.split()[0])}|\w+ForCausalLM)\b", "MODEL", " ".join(cell.split()))
        cell = re.sub(r"(\d+\.\d%) with (\w+)", "N% with KERNEL", cell)
        return f"[{notes.setdefault(cell, len(notes) + 1)}]"

    columns = ["Architecture", "Tokenizer", *COLUMNS]
    lines = [_HEAD, f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for name, row in rows.items():
        cells = [f"`{name}`", habit_of(name), *(shown(name, row.get(column)) for column in COLUMNS)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {textwrap.shorten(cell, 320)}" for cell, number in notes.items())]
    return "\n".join(lines)


def _bad(cell: str) -> bool:
    return cell.startswith(("traceback:", "wrong:", "exit "))


if __name__ == "__main__":
    sys.exit(main())
