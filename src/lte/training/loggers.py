"""Checks the loggers that a run reports to."""

from collections.abc import Iterable


def check_loggers(names: Iterable[str]) -> None:
    """Raise ValueError unless Hugging Face knows these loggers, and their packages are installed."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK  # slow to import

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to is {name!r}, but it is none, or of {known}")
        try:
            INTEGRATION_TO_CALLBACK[name]()  # raises an error that says what is missing
        except (RuntimeError, ImportError) as error:
            raise ValueError(f"report_to is {name!r}, which cannot be used: {error} Or give none.") from error
