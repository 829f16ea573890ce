"""See `tools.mazes.Options`."""

import sys

from offrl.cli import options, readable_errors
from tools.mazes import Options, look

if __name__ == "__main__":
    with readable_errors():
        look(options(Options, sys.argv[1:]))
