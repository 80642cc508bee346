"""``python -m gfnode_fast.cli``."""

import sys

from gfnode_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
