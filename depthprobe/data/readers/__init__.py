"""Readers of raw logs: :mod:`~depthprobe.data.readers.formats` has the table of them."""
