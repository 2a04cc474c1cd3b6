"""Plan a study, run its trials, keep and read their records."""
