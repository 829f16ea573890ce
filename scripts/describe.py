"""See `offrl.cli.describe`."""

from offrl.cli import describe

if __name__ == "__main__":
    describe()
