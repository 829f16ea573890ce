"""Regularizers of token policies."""
