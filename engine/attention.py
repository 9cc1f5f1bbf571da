"""
attention.py: softmax(q kᵀ / √d) v.

All three models call `attend`, and only this file knows which device likes which form.
"""

import torch
import torch.nn.functional as F

# cuDNN's attention, which SDPA may prefer on H100, builds a plan for each new shape (23 ms to 0.5
# s), and its masked bf16 backward pass can give NaN (pytorch issue 196678). Without it, SDPA takes
# FlashAttention.
torch.backends.cuda.enable_cudnn_sdp(False)

QUERIES_AT_ONCE = 500  # on CPUs: so that their scores stay in cache


def causal_bias(positions, n_keys, dtype):
    """Added to scores: 0 for the keys up to a query's position, -inf for later ones.

    positions (B, T). -> (B, 1, T, n_keys)
    """
    later = torch.arange(n_keys, device=positions.device) > positions[:, None, :, None]
    return torch.zeros(later.shape, dtype=dtype, device=positions.device).masked_fill_(
        later, -torch.inf
    )


def attend(q, k, v, causal=False, bias=None, dropout=0.0):
    """softmax(q kᵀ / √d + bias) v.   q (B, H, T, d), k and v (B, G, S, d): H / G query heads share
    a key head. -> (B, H, T, d)

    causal: query i sees the keys up to i. bias: see causal_bias. dropout: of the attention weights.
    On GPUs this is FlashAttention, through SDPA; with a bias, the memory-efficient kernel.
    On CPUs plain products are faster in bf16 (LOG.md, "attention on CPUs").
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return products(q, k, v, causal, bias, dropout)
    if bias is None:
        grouped = k.shape[1] != q.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=causal, dropout_p=dropout, enable_gqa=grouped
        )
    # The memory-efficient kernel has no grouped heads. The query heads of a group become further
    # query positions of their key head: so K and V are not copied per head.
    B, H, T, d = q.shape
    q, n_shared = q.reshape(B, k.shape[1], -1, d), H // k.shape[1]
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.repeat(1, 1, n_shared, 1), dropout_p=dropout
    )
    return out.view(B, H, T, d)


def products(q, k, v, causal=False, bias=None, dropout=0.0):
    """`attend` as it is written in books: one product, softmax, another product."""
    B, H, T, d = q.shape
    G, S = k.shape[1:3]
    if causal:
        bias = causal_bias(torch.arange(T, device=q.device)[None], S, q.dtype)
    q = (q * d**-0.5).reshape(B, G, H // G * T, d)  # the query heads of a group side by side
    k, v = k.contiguous().transpose(2, 3), v.contiguous()
    if bias is None:
        parts = [
            F.dropout((part @ k).softmax(-1), dropout) @ v
            for part in q.split(QUERIES_AT_ONCE, dim=2)
        ]
        return torch.cat(parts, dim=2).view(B, H, T, d)
    scores = (q @ k).view(B, G, H // G, T, S) + bias[:, :, None]
    weights = F.dropout(scores.softmax(-1), dropout).view(B, G, -1, S)
    return (weights @ v).view(B, H, T, d)
