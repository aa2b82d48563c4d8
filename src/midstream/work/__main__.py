"""`python -m midstream.work NAME`."""

import sys

from midstream.work.protocol import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
