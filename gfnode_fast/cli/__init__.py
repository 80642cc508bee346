"""The command line, ``gfnode-fast``."""
