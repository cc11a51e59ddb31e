"""RMSNorm, with a residual where asked."""
