"""One page that compares runs. Reads ``config.json``, ``metrics.csv`` and ``evaluation.json``; imports no torch."""

from lowbit.report.page import compare

__all__ = ["compare"]
