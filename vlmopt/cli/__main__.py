"""``python -m vlmopt.cli``: the command without its installed script."""

import sys

from vlmopt.cli import main

sys.exit(main())
