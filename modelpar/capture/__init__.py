"""Reads a torch model: what it consists of, where it may be cut, what its parts cost."""
