"""The report: one page from rows of results, and from what a model's routers do on a text."""
