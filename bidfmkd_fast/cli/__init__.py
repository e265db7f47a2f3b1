"""Provide the command line: a file per group of commands, each with options beside its code."""
