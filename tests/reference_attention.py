"""Attention over sequences of all lengths, by the definition; and stand-ins for kernels that run on GPUs alone."""

from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    """Causal attention of one sequence: (S, H, D), (S, KV, D) twice -> (S, H, D); a token sees `window` tokens."""
    length, grouped = len(query), query.shape[1] != key.shape[1]
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


def end_to_end(query, key, value, borders, scale, window) -> Tensor:
    lengths = borders.diff().tolist()
    parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*part, scale, window) for part in parts])


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k,
    *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None,
    num_splits=None,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn, strict about what it demands."""
    for x in (query, key, value):
        assert (x.dim(), x.stride(-1), x.dtype, x.device) == (3, 1, query.dtype, query.device)
    assert cu_seq_q is cu_seq_k
    assert (cu_seq_q.dtype, cu_seq_q.is_contiguous(), cu_seq_q.device) == (torch.int32, True, query.device)
    assert (int(cu_seq_q[0]), int(cu_seq_q[-1]), len(key)) == (0, len(query), len(query))
    assert type(max_q) is int
    assert max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0
    return end_to_end(query, key, value, cu_seq_q, scale, None if left == -1 else left + 1)


def hub_kernel() -> ModuleType:
    """What the package `kernels` would load from the hub: FlashAttention 2's two functions."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False,
    ):  # fmt: skip
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        return end_to_end(q, k, v, cu_seqlens_q, softmax_scale, None if window_size[0] == -1 else window_size[0] + 1)

    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
        deterministic=False,
    ):  # fmt: skip
        assert causal
        window = None if window_size[0] == -1 else window_size[0] + 1
        return torch.stack([attend(*row, softmax_scale, window) for row in zip(q, k, v, strict=True)])

    kernel = ModuleType("flash_attn2")
    kernel.flash_attn_func, kernel.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    return kernel
