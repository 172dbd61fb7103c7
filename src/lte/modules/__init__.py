"""The sparse FFN as ``nn.Module``: router, selection in three modes, and recording of scores."""
