"""Training: data, the stages, the sparsity controller, and ``LTETrainer`` on ``transformers.Trainer``."""
