"""``python -m gfnode_fast.cli``."""

import sys

from gfnode_fast.cli.main import main

sys.exit(main())
