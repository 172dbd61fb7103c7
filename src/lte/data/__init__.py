"""What users point at, as tokens and rows: files, hub data sets, tasks, chats, packing. Nothing of sparsity."""
