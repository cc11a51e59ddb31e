"""RMSNorm over the channels of a feature map, with an optional residual."""

from sana_lab.ops.rms_norm.reference import rms_norm_2d as rms_norm_2d
