"""Distances between distributions of images: FID, KID, CMMD, precision and recall."""
