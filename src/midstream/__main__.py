"""`python -m midstream`: the command line."""

import sys

from midstream.cli.app import app

if __name__ == "__main__":
    sys.exit(app(prog_name="midstream"))
