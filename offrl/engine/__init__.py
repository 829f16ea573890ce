"""The loop around every method: stages, evaluation, logs, checkpoints."""
