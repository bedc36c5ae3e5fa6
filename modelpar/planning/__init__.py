"""Decides: which layers form which stage, who computes what in which order, and what that will cost.

Everything here is pure data and pure functions over numpy and the standard library; torch is never imported.
"""
