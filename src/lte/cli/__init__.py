"""The command ``lte``: one file a subcommand, each imported only when it is called."""
