"""Sampling from an existing image."""
