"""Data of users as tokens and rows: files, hub data sets, tasks, chats, packing. It knows nothing of sparsity."""
