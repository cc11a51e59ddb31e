"""3x3 convolutions for inference: `conv3x3` with norm, activation and residual, and `upsample_conv3x3`."""

from sana_lab.ops.conv.reference import Norm as Norm
from sana_lab.ops.conv.reference import conv3x3 as conv3x3
from sana_lab.ops.conv.upsample import upsample_conv3x3 as upsample_conv3x3
