"""Layers that know nothing of the U-Net."""
