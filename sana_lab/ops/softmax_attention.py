"""Softmax attention by PyTorch's fused kernels, in the precision that is fast on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sana_lab.ops.backend import forward_mode, no_autocast


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of q (B, H, N, D), k and v (B, H, L, D) -> (B, H, N, D), in autocast's or q's dtype.

    `mask`, boolean and broadcast to (B, H, N, L), is True at valid keys. Training in half precision on the CPU is in
    float32: the backward pass of the fused kernel takes ten times as long in bfloat16 (19 ms for 2 ms at 16 tokens).
    Under torch.func.jvp it is in plain torch, as the fused kernels have no forward-mode derivative.
    """
    if forward_mode():
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    half = dtype in (torch.bfloat16, torch.float16)
    if not (half and q.device.type == "cpu" and torch.is_grad_enabled()):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with no_autocast(q.device):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(dtype)
