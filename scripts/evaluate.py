"""See `offrl.cli.evaluate`."""

from offrl.cli import evaluate

if __name__ == "__main__":
    evaluate()
