"""Sampling from an existing image, or between two samples."""
