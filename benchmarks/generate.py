"""Generated conversations with log-normal lengths, for the benchmarks: the same seed gives the same rows."""

import json
import math
from pathlib import Path

import numpy as np

WORDS = (
    "the patient should drink water and rest while a doctor checks blood pressure heart rate temperature skin eyes "
    "ears hands feet back chest lungs liver kidneys bones muscles nerves food sleep exercise medicine clean wound"
)


def write_conversations(path: Path, rows: int, mean_tokens: int = 180, p99_tokens: int = 900, seed: int = 0) -> None:
    """ShareGPT rows of about `mean_tokens` words in all, with the 99th percentile at `p99_tokens`.

    A log-normal of parameters m, s has mean exp(m + s^2/2) and 99th percentile exp(m + 2.326 s): solved for s.
    """
    gap = math.log(p99_tokens / mean_tokens)
    s = 2.326 - math.sqrt(2.326**2 - 2 * gap)
    m = math.log(mean_tokens) - s * s / 2
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(m, s, rows), 8, 4 * p99_tokens).astype(int)
    with path.open("w", encoding="utf-8") as out:
        for i, length in enumerate(lengths):
            words = rng.choice(WORDS.split(), length)
            cut = max(2, int(length) // 4)
            row = {
                "conversations": [
                    {"from": "human", "value": f"{i}: " + " ".join(words[:cut])},
                    {"from": "gpt", "value": " ".join(words[cut:])},
                ]
            }
            out.write(json.dumps(row) + "\n")
