"""Inner part of Mix-FFN in plain torch: reference and closed-form gradients.

B batch, h, w token grid, M hidden width; * is a depthwise convolution with zero padding:
    (a, g) = silu(x) * weight + bias, the first M channels and the last M      out = a silu(g)
    da = dout silu(g)      dg = dout a silu'(g)      dx = silu'(x) (dy * weight with both axes reversed), dy = (da, dg)
    dweight[k] = sum over tokens of dy times silu(x) of the neighbour k      dbias = sum over tokens of dy
"""

import torch
from torch import Tensor
from torch.nn import functional as F

Grads = tuple[Tensor, Tensor, Tensor]


def definition(x: Tensor, weight: Tensor, bias: Tensor, overwrite: bool = False) -> Tensor:
    """`mix_ffn` in plain torch; `overwrite` computes the bitwise identical result in x's memory."""
    y, gate = convolve(F.silu(x, inplace=overwrite), weight, bias).chunk(2, -1)
    return y * F.silu(gate, inplace=overwrite)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution of tokens (B, h, w, C), channels last in memory.

    A grid smaller than the kernel is padded with zeros to the kernel's size, which does not change the result: oneDNN's
    backward takes seven times as long on 2 x 2 as on 3 x 3.
    """
    h, w, least = *x.shape[1:3], weight.shape[-1]
    if h < least or w < least:
        x = F.pad(x, (0, 0, 0, max(0, least - w), 0, max(0, least - h)))
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=least // 2, groups=len(weight))
    return y.permute(0, 2, 3, 1)[:, :h, :w]


def gradients(dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Grads:
    """Closed-form gradients of `definition` for a 3 x 3 kernel: (dx, dweight, dbias) for dout (B, h, w, M)."""
    s = F.silu(x)
    a, g = convolve(s, weight, bias).chunk(2, -1)
    dy = torch.cat([dout * F.silu(g), torch.ops.aten.silu_backward(dout * a, g)], -1)
    image, same, none, c = (t.permute(0, 3, 1, 2) for t in (dy, s)), [1, 1], [0, 0], len(weight)
    mask = [True, True, True]
    ds, dw, db = torch.ops.aten.convolution_backward(*image, weight, [c], same, same, same, False, none, c, mask)
    return torch.ops.aten.silu_backward(ds.permute(0, 2, 3, 1), x), dw, db
