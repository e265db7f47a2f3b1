"""Provide the command line: one file per group of commands, each with its options beside its code."""
