"""A small network that every layout holds."""

from support.networks import SMALL

FAMILY = SMALL | {"upsample": "nearest", "learned_null": False, "num_heads": 1, "time_frequencies": "half"}
