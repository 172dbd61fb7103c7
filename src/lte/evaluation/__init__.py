"""Measuring quality, sparsity and cost of a model: of text it reads, and of text it writes."""
