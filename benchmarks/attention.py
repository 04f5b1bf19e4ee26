"""Seconds of one attention call, forward and backward: full causal SDPA against S2-Attn (--shift_attn).

    python -m benchmarks.attention
    python -m benchmarks.attention --device cuda --lengths 8192,32768

A random batch in the memory layout that models give it. The kinds take turns, so that what else the machine does hits
all of them alike; `forward_s` and `backward_s` are medians, `speedup` is full SDPA's sum over the kind's own. On CUDA
there is FlashAttention-2 too where the package is installed. Prints JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from stagewise.modeling.s2_attention import default_group, s2_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def full_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shares_heads = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=shares_heads).transpose(1, 2)


def flash_attention_2() -> Attention | None:
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return None
    return lambda *inputs: flash_attn_func(*(x.transpose(1, 2) for x in inputs), causal=True)


def kinds_of(length: int, groups: list[int], device: str, dtype: torch.dtype) -> dict[str, Attention]:
    """What is timed at this length: the full kinds, then S2-Attn with a quarter of the length and with `groups`."""
    kinds: dict[str, Attention] = {"full sdpa": full_sdpa}
    flash = flash_attention_2() if device == "cuda" and dtype != torch.float32 else None
    if flash:
        kinds["full flash_attention_2"] = flash
    for group in dict.fromkeys((default_group(length), *groups)):
        kinds[f"s2 group {group}"] = lambda q, k, v, group=group: s2_attention(q, k, v, group)
    return kinds


def measure(kinds: dict[str, Attention], inputs: list[Tensor], repeats: int) -> dict[str, dict]:
    """Medians of each kind over `repeats` rounds after one that is not counted."""
    batch, heads, length, dim = inputs[0].shape
    gradient = torch.randn(batch, length, heads, dim, dtype=inputs[0].dtype, device=inputs[0].device)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    for _ in range(repeats + 1):
        for name, attention in kinds.items():
            times = [clock(inputs[0].device)]
            out = attention(*inputs)
            times.append(clock(inputs[0].device))
            torch.autograd.grad(out, inputs, gradient)
            times.append(clock(inputs[0].device))
            seconds[name].append((times[1] - times[0], times[2] - times[1]))
    medians = {
        name: [statistics.median(part) for part in zip(*times[1:], strict=True)] for name, times in seconds.items()
    }
    full = sum(medians["full sdpa"])
    return {
        name: {
            "forward_s": round(forward, 5),
            "backward_s": round(backward, 5),
            "speedup": round(full / (forward + backward), 2),
        }
        for name, (forward, backward) in medians.items()
    }


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> dict:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--lengths", type=numbers, default=[2048, 4096, 8192])
    parser.add_argument("--groups", type=numbers, default=[512], help="beside a quarter of the length")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key_value_heads", type=int, help="unset: as many as --heads")
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    heads = (args.heads, *[args.key_value_heads or args.heads] * 2)
    results = []
    for dtype in (getattr(torch, name) for name in args.dtypes.split(",")):
        for length in args.lengths:
            shapes = [(args.batch, length, number, args.head_dim) for number in heads]
            inputs = [torch.randn(*shape, dtype=dtype, device=args.device).transpose(1, 2) for shape in shapes]
            kinds = kinds_of(length, args.groups, args.device, dtype)
            times = measure(kinds, [x.requires_grad_() for x in inputs], args.repeats)
            results.append({"length": length, "dtype": str(dtype).removeprefix("torch."), **times})
    report = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads",
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "shape": {name: getattr(args, name) for name in ("batch", "heads", "key_value_heads", "head_dim")},
        "results": results,
    }
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    main()
