"""``python -m fastfusion``: the command line."""

import sys

from fastfusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
