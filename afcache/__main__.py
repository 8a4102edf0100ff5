"""`python -m afcache`."""

import sys

from afcache.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
