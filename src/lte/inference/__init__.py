"""Decoding a trained sparse model: packing, and generation with static caches and compiled steps."""
