"""Serving: engines of others run a sparse model, and its FFNs stay ours."""
