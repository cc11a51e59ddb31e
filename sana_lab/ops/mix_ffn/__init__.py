"""Mix-FFN's SiLU, 3x3 depthwise convolution and gate, as one operator."""
