"""What the commands do: training, scoring, collecting, reporting."""
