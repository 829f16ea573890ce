"""See `offrl.cli.export`."""

from offrl.cli import export

if __name__ == "__main__":
    export()
