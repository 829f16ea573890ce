"""See `offrl.cli.speed`."""

from offrl.cli import speed

if __name__ == "__main__":
    speed()
