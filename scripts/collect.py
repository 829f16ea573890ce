"""See `offrl.cli.collect`."""

from offrl.cli import collect

if __name__ == "__main__":
    collect()
