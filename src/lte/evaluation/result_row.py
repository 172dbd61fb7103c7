"""The type of a row of results, as it is in a ``.jsonl`` file: training, the benchmarks and the report share it."""

from typing import Any

ResultRow = dict[str, Any]
"""A JSON object. :class:`lte.evaluation.record.Record` is the same with types, for rows that measure a model."""
