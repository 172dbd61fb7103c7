"""Pure functions on tensors: grouping, selection, losses, accounting."""
