"""Probing: what the trained teacher tells without any further training."""
