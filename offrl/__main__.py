"""`python -m offrl` is the command `offrl`."""

from offrl.cli import main

main()
