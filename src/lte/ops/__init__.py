"""One operation, ``sparse_ffn``, and its backends. A backend imports its compiler when it is first used."""
