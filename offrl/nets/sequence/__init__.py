"""Sequence models: Mamba, its multi-grained stack, a transformer."""
