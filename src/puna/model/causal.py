"""Causal attention of packed queries over packed keys and values, by PyTorch.

Legend: B batch, S queries, T keys, H query heads, G key/value heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q_BSHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, start: int, first: int, chunk: int | None) -> Tensor:
    """Causal attention [B, S, H, K] of queries at positions start.. over keys at positions first.. .

    With `chunk`, position p sees only positions of its own aligned block floor(p / chunk).
    """
    S, T = q_BSHK.shape[1], k_BTGK.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q_BSHK, k_BTGK, v_BTGK))
    if S == 1:
        return _attend_one(q, k, v).transpose(1, 2)
    if chunk is not None and first // chunk == (first + T - 1) // chunk:
        chunk = None  # all in one chunk: plain causal attention
    if S == T and chunk is not None and first % chunk == 0:
        return _attend_blocks(q_BSHK, k_BTGK, v_BTGK, chunk)
    if S == T and chunk is None:
        return F.scaled_dot_product_attention(q, *_repeated(q, k, v), is_causal=True).transpose(1, 2)
    queries = torch.arange(start, start + S, device=q.device)[:, None]
    keys = torch.arange(first, first + T, device=q.device)[None, :]
    mask = keys <= queries
    if chunk is not None:
        mask &= keys // chunk == queries // chunk
    return F.scaled_dot_product_attention(q, *_repeated(q, k, v), attn_mask=mask).transpose(1, 2)


def _attend_one(q_BH1K: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """One query a row sees every key it is shown: the heads of a group become rows, so no key is read twice."""
    q_BGRK = q_BH1K.squeeze(2).unflatten(1, (k_BGTK.shape[1], -1))
    return F.scaled_dot_product_attention(q_BGRK, k_BGTK, v_BGTK).flatten(1, 2).unsqueeze(2)


def _attend_blocks(q_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, chunk: int) -> Tensor:
    """Chunked attention from a chunk's start as a batch of short causal ones: work grows with S, not S squared."""
    B, S = q_BSHK.shape[:2]
    padded = [F.pad(x, (0, 0, 0, 0, 0, -S % chunk)) for x in (q_BSHK, k_BSGK, v_BSGK)]
    q, k, v = (x.unflatten(1, (-1, chunk)).flatten(0, 1).transpose(1, 2) for x in padded)
    out = F.scaled_dot_product_attention(q, *_repeated(q, k, v), is_causal=True).transpose(1, 2)
    return out.unflatten(0, (B, -1)).flatten(1, 2)[:, :S]


def _repeated(q_BHSK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values once a query head."""
    times = q_BHSK.shape[1] // k_BGTK.shape[1]
    if times == 1:
        return k_BGTK, v_BGTK
    return k_BGTK.repeat_interleave(times, 1), v_BGTK.repeat_interleave(times, 1)
