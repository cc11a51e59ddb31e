"""ReLU linear attention: `linear_attention` of q, k, v, and `qkv_linear_attention` of a fused projection."""

from sana_lab.ops.linear_attention.reference import Norms as Norms
from sana_lab.ops.linear_attention.reference import linear_attention as linear_attention
from sana_lab.ops.linear_attention.reference import qkv_linear_attention as qkv_linear_attention
