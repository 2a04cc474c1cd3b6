"""The report of a run: the answer in words, figures, tables, one HTML page."""
