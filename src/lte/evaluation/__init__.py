"""Measuring quality, sparsity and cost of a model in one pass over text."""
