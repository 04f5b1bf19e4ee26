"""The label audit: what will be trained on, in colour and in numbers. A violation stops the run before it starts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stagewise.data.records import Conversation
from stagewise.data.tokenization import EncodingOptions, Renderer, encode_texts
from stagewise.errors import InputError
from stagewise.losses.logprobs import IGNORE_INDEX

CHECKED_ROWS = 200
MARKUP = "template"  # the role of what the template writes around the contents


@dataclass
class LabelAudit:
    """What the checked rows showed. `violations` name the row and what is wrong."""

    checked: int = 0
    trained_by_role: Counter = field(default_factory=Counter)
    tokens_by_role: Counter = field(default_factory=Counter)
    turns_without_stop: int = 0
    straddling_prompts: int = 0
    violations: list[str] = field(default_factory=list)


def audit_conversations(
    records: Dataset, encoded: Dataset, renderer: Renderer, tokenizer, options: EncodingOptions, seed: int = 0
) -> LabelAudit:
    """Check up to 200 rows, chosen with `seed`, against what inference would feed the model.

    For each row: every label is IGNORE_INDEX or the token itself; no token of a user, system or tool text is trained
    (unless --train_on_prompt); each trained answer ends with a stop token; and up to each answer the ids equal the ids
    of the prompt that inference renders, token by token. (Where a template ends its prompt with a blank, a token may
    straddle the border of prompt and answer: it is counted.)

    Args:
        records: column `record`, what was tokenized.
        encoded: what tokenize_conversations returned.

    Raises:
        InputError: on the first violation, with the row's location.
    """
    usable = [i for i, reason in enumerate(encoded["dropped"][:]) if not reason] if len(encoded) else []
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.permutation(len(usable))[:CHECKED_ROWS].tolist())
    audit = LabelAudit()
    for i in (usable[j] for j in chosen):
        row = encoded[i]
        conversation = Conversation.from_json(records[row["conversation"]]["record"])
        for problem in _check_row(audit, conversation, row, renderer, tokenizer, options):
            audit.violations.append(f"{row['location']}: {problem}")
        audit.checked += 1
    if audit.violations:
        raise InputError(
            "label audit: " + audit.violations[0] + f" ({len(audit.violations)} violations in {audit.checked} rows)"
        )
    return audit


def _check_row(audit: LabelAudit, conversation: Conversation, row: dict, renderer, tokenizer, options) -> list[str]:
    ids, labels = row["input_ids"], row["labels"]
    if any(label not in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True)):
        return ["a label is neither IGNORE_INDEX nor the token itself"]
    messages = conversation.messages[: row["messages"]]
    rendered = renderer.render(messages, tools=conversation.tools)
    found, offsets = next(encode_texts([rendered.text], tokenizer, len(ids)))
    if found[: len(ids)] != ids:
        return ["input_ids are not the tokenizer's ids of the rendered text"]
    roles = _token_roles(rendered, messages, list(offsets)[: len(ids)])
    problems = []
    for role, label in zip(roles, labels, strict=True):
        audit.tokens_by_role[role] += 1
        audit.trained_by_role[role] += label != IGNORE_INDEX
        if label != IGNORE_INDEX and role in ("user", "system", "tool") and not options.train_on_prompt:
            problems.append(f"a {role} token is trained")
    problems += _check_stops(audit, row, renderer, tokenizer, options)
    return problems + _check_prompts(audit, messages, conversation.tools, ids, rendered, renderer, tokenizer)


def _token_roles(rendered, messages: Sequence[dict], offsets: Sequence[tuple[int, int]]) -> list[str]:
    """The role whose text each token starts in; what the template adds has the role "template".

    Contents are looked for in order, outside the trained spans for users and inside for answers, so that an answer
    that quotes the question is not taken for it.
    """
    size = max((end for _, end in offsets), default=0) + 1  # of a long text only the beginning was kept
    owner = [MARKUP] * size
    spans = dict(zip(rendered.turns, rendered.spans, strict=True))
    cursor = 0
    for index, message in enumerate(messages):
        if index in spans:
            start, end = spans[index]
        else:  # an answer, too, that is rendered otherwise now and trained in a row of its own
            content = (message["content"] or "").strip()
            start = rendered.text.find(content, cursor)
            end = start + len(content)
            if start < 0:
                continue
        owner[start:end] = [message["role"]] * (min(end, size) - min(start, size))
        cursor = max(cursor, end)
    # a token that straddles into an answer belongs to it
    return [owner[max(start, end - 1)] for start, end in offsets]


def _trained_runs(labels: Sequence[int]) -> list[tuple[int, int]]:
    runs, start = [], None
    for i, label in enumerate([*labels, IGNORE_INDEX]):
        if label != IGNORE_INDEX and start is None:
            start = i
        elif label == IGNORE_INDEX and start is not None:
            runs.append((start, i))
            start = None
    return runs


def _check_stops(audit: LabelAudit, row: dict, renderer, tokenizer, options: EncodingOptions) -> list[str]:
    stop_ids = {tokenizer.convert_tokens_to_ids(token) for token in renderer.stop_tokens}
    if options.train_on_prompt:
        return []
    runs = _trained_runs(row["labels"])
    without = [end for _, end in runs if row["input_ids"][end - 1] not in stop_ids]
    if without and row["truncated"] == "answer":
        audit.turns_without_stop += 1
        return []
    if without:
        last = tokenizer.decode(row["input_ids"][without[0] - 1])
        return [f"an answer ends with {last!r} and not with a stop token ({', '.join(renderer.stop_tokens)})"]
    return []


def _check_prompts(audit, messages, tools, ids, rendered, renderer, tokenizer) -> list[str]:
    for i, (start, _) in zip(rendered.turns, rendered.spans, strict=True):
        prompt = renderer.render(messages[:i], tools=tools, add_generation_prompt=True).text
        if prompt != rendered.text[:start]:
            continue  # a named template renders earlier answers without the think block that its prompt opens
        fed, _ = next(encode_texts([prompt], tokenizer, len(ids)))
        if len(fed) > len(ids) or fed == list(ids[: len(fed)]):
            continue
        audit.straddling_prompts += 1
        same = next(k for k, (a, b) in enumerate(zip(fed, ids, strict=False)) if a != b)
        if same < len(fed) - 2:
            tail = tokenizer.decode(fed[same:])
            return [f"inference feeds {tail!r} before the answer, training has other tokens there"]
    return []


def print_audit(audit: LabelAudit, encoded: Dataset, tokenizer, n_rows: int, console: Console | None = None) -> None:
    """The numbers, and the first `n_rows` rows with trained tokens in green."""
    console = console or Console()
    for i in range(min(n_rows, len(encoded))):
        row = encoded[i]
        console.print(f"[bold]{row['location']}[/bold]  {row['length']} tokens, {row['trained']} trained")
        console.print(colour_labels(row["input_ids"], row["labels"], tokenizer))
    table = Table(title=f"Label audit of {audit.checked} rows")
    for column in ("role", "tokens", "trained"):
        table.add_column(column, justify="left" if column == "role" else "right")
    for role in sorted(audit.tokens_by_role):
        table.add_row(role, f"{audit.tokens_by_role[role]:,}", f"{audit.trained_by_role[role]:,}")
    console.print(table)
    if audit.straddling_prompts:
        console.print(f"{audit.straddling_prompts} prompts end inside a token that the answer begins with")
    further = sum(encoded["further"][:])
    if further:
        console.print(
            f"{len(encoded) - further} conversations became {len(encoded)} rows: the chat template renders earlier "
            "answers otherwise once others follow, so those are trained in rows of their own"
        )
    remarks = Counter(remark for text in encoded["remarks"][:] if text for remark in text.split("; "))
    for remark, count in remarks.items():
        console.print(f"the chat template, in {count} of {len(encoded) - further} conversations: {remark}")
    truncated = sum(bool(kind) for kind in encoded["truncated"][:])
    if truncated:
        console.print(
            f"{truncated} of {len(encoded)} rows were cut to the row limit ({truncated / len(encoded):.1%}); answers "
            f"without their stop token among the audited ones: {audit.turns_without_stop}"
        )
    print_lengths(encoded["length"][:], console)


def colour_labels(input_ids: Sequence[int], labels: Sequence[int], tokenizer) -> Text:
    """The row's text; runs of trained tokens green, the rest dim. Decoded run by run, so that characters of several
    tokens stay whole."""
    text = Text()
    start = 0
    for run_start, run_end in [*_trained_runs(labels), (len(input_ids), len(input_ids))]:
        text.append(tokenizer.decode(input_ids[start:run_start]), style="dim")
        text.append(tokenizer.decode(input_ids[run_start:run_end]), style="bold green")
        start = run_end
    return text


def print_lengths(lengths: Sequence[int], console: Console) -> None:
    """A histogram of row lengths in tokens."""
    found = np.asarray(lengths)
    found = found[found > 0]
    if not len(found):
        return
    counts, edges = np.histogram(found, bins=min(8, max(1, int(found.max() - found.min()))))
    console.print(
        f"lengths in tokens: min {found.min()}, median {int(np.median(found))}, "
        f"99th percentile {int(np.percentile(found, 99))}, max {found.max()}"
    )
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        console.print(f"{int(low):>7} - {int(high):<7} {'#' * round(40 * count / counts.max()):<40} {count:,}")
