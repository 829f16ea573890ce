"""See `offrl.cli.report`."""

from offrl.cli import report

if __name__ == "__main__":
    report()
