"""Ranks, metrics, intervals, and the smallest depth that is good enough."""
