"""Run experiments: methods trained on one pool, meta-tested on the same episodes, in one table."""
