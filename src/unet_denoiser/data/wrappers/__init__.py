"""Wrappers that change the items of a dataset."""
