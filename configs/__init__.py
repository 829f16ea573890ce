"""Hydra configurations, shipped with the package."""
