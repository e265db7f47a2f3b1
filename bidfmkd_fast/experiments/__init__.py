"""Experiments: methods trained on one pool, evaluated on the same episodes, in one table."""
