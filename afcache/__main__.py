"""`python -m afcache`."""

import sys

from afcache.cli import main

if __name__ == "__main__":
    sys.exit(main())
