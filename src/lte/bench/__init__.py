"""Dense against sparse in seconds: one FFN, a whole model, a training step. What is timed is compared first."""
