"""The audit of preference pairs: what each pair compares, and what a model could learn from them by mistake."""

from dataclasses import dataclass, field
from os.path import commonprefix

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagewise.data.audit import CHECKED_ROWS
from stagewise.data.preferences import COMPLETION_TRUNCATED, SAME_AFTER_TRUNCATION, SAME_ANSWERS
from stagewise.data.records import PreferencePair
from stagewise.data.tokenization import Renderer
from stagewise.errors import InputError

# From here on the pairs say "longer is better" so clearly that a model may learn just that.
LONGER_SHARE, LONGER_RATIO = 0.8, 1.5


@dataclass
class PreferenceAudit:
    """What the pairs showed. Lengths are tokens of the completions before they were cut.

    equal, equal_after_truncation: pairs that were dropped because nothing tells their answers apart.
    only_length_differs: one answer is the beginning of the other.
    chosen_longer: share of the pairs; length_ratio: mean of chosen / rejected.
    checked, straddling_prompts: as in the label audit, of up to 200 pairs.
    """

    pairs: int = 0
    equal: int = 0
    equal_after_truncation: int = 0
    only_length_differs: int = 0
    chosen_longer: float = 0.0
    length_ratio: float = 1.0
    checked: int = 0
    straddling_prompts: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def longer_is_better(self) -> bool:
        """Whether the chosen answers are simply the longer ones."""
        return self.chosen_longer >= LONGER_SHARE or self.length_ratio >= LONGER_RATIO


def audit_preferences(
    records: Dataset, encoded: Dataset, renderer: Renderer, tokenizer, seed: int = 0
) -> PreferenceAudit:
    """Count over all pairs, and check up to 200 of them, chosen with `seed`.

    For each checked pair: prompt_ids are what inference would feed, token by token (where a token straddles the border
    of prompt and completion it is counted), and a completion that was not cut holds a stop token.

    Args:
        records: column `record`; row i belongs to row i of `encoded`.
        encoded: what tokenize_preferences returned.

    Raises:
        InputError: on the first violation, with the row's location.
    """
    audit = _count(encoded)
    usable = [i for i, reason in enumerate(encoded["dropped"][:]) if not reason] if len(encoded) else []
    chosen = np.random.default_rng(seed).permutation(len(usable))[:CHECKED_ROWS]
    stop_ids = {tokenizer.convert_tokens_to_ids(token) for token in renderer.stop_tokens}
    for i in sorted(usable[j] for j in chosen.tolist()):
        row = encoded[i]
        problem = _check_prompt(audit, PreferencePair.from_json(records[i]["record"]), row, renderer, tokenizer)
        problem = problem or _check_stops(row, stop_ids)
        if problem:
            audit.violations.append(f"{row['location']}: {problem}")
        audit.checked += 1
    if audit.violations:
        raise InputError(
            "preference audit: "
            + audit.violations[0]
            + f" ({len(audit.violations)} violations in {audit.checked} pairs)"
        )
    return audit


def _count(encoded: Dataset) -> PreferenceAudit:
    audit = PreferenceAudit(pairs=len(encoded))
    longer, ratios = 0, 0.0
    columns = ["chosen_length", "rejected_length", "only_length_differs", "dropped"]
    compared = 0
    for batch in encoded.select_columns(columns).with_format("pandas").iter(batch_size=100_000):
        audit.equal += int((batch["dropped"] == SAME_ANSWERS).sum())
        audit.equal_after_truncation += int((batch["dropped"] == SAME_AFTER_TRUNCATION).sum())
        rows = batch[batch["dropped"].isin(["", SAME_AFTER_TRUNCATION])]
        audit.only_length_differs += int(rows["only_length_differs"].sum())
        longer += int((rows["chosen_length"] > rows["rejected_length"]).sum())
        ratios += float((rows["chosen_length"] / rows["rejected_length"]).sum())
        compared += len(rows)
    if compared:
        audit.chosen_longer, audit.length_ratio = longer / compared, ratios / compared
    return audit


def _check_prompt(audit: PreferenceAudit, pair: PreferencePair, row: dict, renderer: Renderer, tokenizer) -> str:
    if row["truncated"].startswith("prompt"):
        return ""
    fed = tokenizer(
        renderer.render(pair.prompt, tools=pair.tools, add_generation_prompt=True).text,
        add_special_tokens=False,
        verbose=False,
    )["input_ids"]
    if fed == row["prompt_ids"]:
        return ""
    audit.straddling_prompts += 1
    same = len(commonprefix([fed, row["prompt_ids"]]))
    if same < len(fed) - 2 and same < len(row["prompt_ids"]):
        return f"inference feeds {tokenizer.decode(fed[same:])!r} before the answer, the pair has other tokens there"
    return ""


def _check_stops(row: dict, stop_ids: set[int]) -> str:
    if row["truncated"].endswith(COMPLETION_TRUNCATED):
        return ""
    for name in ("chosen_ids", "rejected_ids"):
        if stop_ids.isdisjoint(row[name]):
            return f"{name} hold no stop token"
    return ""


def print_audit(
    audit: PreferenceAudit, encoded: Dataset, tokenizer, n_pairs: int, console: Console | None = None
) -> None:
    """The first `n_pairs` pairs side by side, what differs in colour, and the numbers."""
    console = console or Console()
    for i in range(min(n_pairs, len(encoded))):
        console.print(side_by_side(encoded[i], tokenizer))
    table = Table(title=f"Preference audit of {audit.pairs} pairs")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for figure, value in (
        ("equal, dropped", f"{audit.equal:,}"),
        ("equal after truncation, dropped", f"{audit.equal_after_truncation:,}"),
        ("one answer is the beginning of the other", f"{audit.only_length_differs:,}"),
        ("chosen is longer", f"{audit.chosen_longer:.1%}"),
        ("mean length, chosen / rejected", f"{audit.length_ratio:.2f}"),
    ):
        table.add_row(figure, value)
    console.print(table)
    if audit.longer_is_better:
        console.print(
            f"[bold yellow]warning:[/bold yellow] the chosen answer is simply the longer one (in "
            f"{audit.chosen_longer:.1%} of the pairs, {audit.length_ratio:.2f} times as long on average): a model may "
            "learn to prefer length; balance the pairs, or compare scores of answers of one length",
            highlight=False,
        )
    if audit.straddling_prompts:
        console.print(f"{audit.straddling_prompts} prompts end inside a token that an answer begins with")
    console.print(_lengths(encoded))


def _lengths(encoded: Dataset) -> Table:
    table = Table(title="Lengths in tokens, before completions are cut")
    for column in ("part", "min", "median", "99th percentile", "max"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in ("prompt", "chosen", "rejected"):
        found = np.percentile(encoded[f"{part}_length"][:], [0, 50, 99, 100])
        table.add_row(part, *(f"{int(length):,}" for length in found))
    return table


def side_by_side(row: dict, tokenizer) -> Table:
    """The shared prompt once, as the title; below it both completions, their common beginning and end dim."""
    title = Text(f"{row['location']}  prompt of {len(row['prompt_ids'])} tokens\n", style="bold")
    title.append(tokenizer.decode(row["prompt_ids"]), style="dim not bold not italic")
    table = Table(title=title, title_justify="left", title_style="", expand=True, show_lines=True)
    completions = [tokenizer.decode(row[name]) for name in ("chosen_ids", "rejected_ids")]
    start, end = _shared_ends(*completions)
    cells = []
    for name, completion, style in zip(("chosen", "rejected"), completions, ("green", "red"), strict=True):
        cut = "" if len(row[f"{name}_ids"]) == row[f"{name}_length"] else f", {len(row[f'{name}_ids'])} kept"
        table.add_column(f"{name}, {row[f'{name}_length']} tokens{cut}", ratio=1, overflow="fold")
        cells.append(
            Text.assemble(
                (completion[:start], "dim"),
                (completion[start : len(completion) - end], f"bold {style}"),
                (completion[len(completion) - end :], "dim"),
            )
        )
    table.add_row(*cells)
    return table


def _shared_ends(one: str, other: str) -> tuple[int, int]:
    """How many characters the beginnings have in common, and how many of the rest the ends."""
    start = len(commonprefix([one, other]))
    end = len(commonprefix([one[start:][::-1], other[start:][::-1]]))
    return start, end
