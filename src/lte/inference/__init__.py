"""Decoding fast: packing, generating, and the benchmarks."""
