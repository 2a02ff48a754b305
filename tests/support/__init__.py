"""Networks, oracles and worker processes that several tests share."""
