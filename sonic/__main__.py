"""``python -m sonic`` is the command ``sonic``."""

import sys

from sonic.cli import main

if __name__ == "__main__":
    sys.exit(main())
