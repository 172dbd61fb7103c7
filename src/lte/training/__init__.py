"""Training: the stages, ``LTETrainer`` on ``transformers.Trainer``, and runs that can be resumed."""
