"""See `tools.goal_report.Options`."""

import sys

from offrl.cli import options, readable_errors
from tools.goal_report import Options, make_goal_report

if __name__ == "__main__":
    with readable_errors():
        make_goal_report(options(Options, sys.argv[1:]))
