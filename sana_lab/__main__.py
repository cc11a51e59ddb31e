"""`python -m sana_lab`, the same as `sana-lab`."""

import sys

from sana_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
