"""Inner part of SANA's Mix-FFN: SiLU, 3 x 3 depthwise convolution, SiLU gate."""

from sana_lab.ops.mix_ffn.reference import mix_ffn as mix_ffn
