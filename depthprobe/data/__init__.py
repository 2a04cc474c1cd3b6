"""Raw logs to time-ordered sequences, to splits, to batches. Imports no torch."""
