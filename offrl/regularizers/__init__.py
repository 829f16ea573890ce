"""Regularizers for any trainer: torch only, nothing else of this library is imported."""

from offrl.regularizers import functional

__all__ = ["functional"]
