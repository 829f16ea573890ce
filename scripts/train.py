"""See `offrl.cli.train`."""

from offrl.cli import train

if __name__ == "__main__":
    train()
