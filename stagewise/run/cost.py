"""--print_cost: what a measured run says about a larger one."""

from collections.abc import Sequence


def measured_rate(log_history: Sequence[dict]) -> float | None:
    """Real tokens per second of all processes, over the logged stretches of training; None where nothing was logged.

    The first stretch is left out where others follow: it holds compilation and the first allocations. Time spent in
    evaluations and checkpoints is not in any of them.
    """
    stretches, seen = [], 0
    for entry in log_history:
        rate = entry.get("tokens_per_second")
        if rate:
            stretches.append((entry["num_tokens"] - seen, rate))
            seen = entry["num_tokens"]
    stretches = stretches[1:] or stretches
    seconds = sum(tokens / rate for tokens, rate in stretches)
    return sum(tokens for tokens, _ in stretches) / seconds if seconds else None


def describe_cost(log_history: Sequence[dict], wanted: tuple[int, int], processes: int, machines: int) -> str:
    """The extrapolation in words, with what it takes for granted.

    Args:
        wanted: real tokens of all epochs together, and on how many machines.
        processes, machines: of the run that was measured.
    """
    rate = measured_rate(log_history)
    if rate is None:
        return "--print_cost: nothing was logged to extrapolate from; lower --logging_steps"
    tokens, wanted_machines = wanted
    each = processes // machines
    hours = tokens / (rate * wanted_machines / machines) / 3600
    here = f"{_count(processes, 'process', 'processes')} on {_count(machines, 'machine', 'machines')}"
    there = f"{_count(wanted_machines, 'machine', 'machines')} of {_count(each, 'process', 'processes')}"
    return (
        f"cost: measured {rate:,.0f} tokens/s with {here}; {tokens:,} tokens on {there}: {hours:,.2f} hours, "
        f"{hours * wanted_machines * each:,.2f} device hours\n"
        "  taken for granted: the same model, flags, hardware and lengths of rows; a machine more adds what one had "
        "here (communication between machines takes some of it); all epochs are in the tokens; no time for start-up, "
        "evaluations and checkpoints"
    )


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
