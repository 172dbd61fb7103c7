"""One operation, ``sparse_ffn``, and its backends, each of which imports its compiler when first used."""
