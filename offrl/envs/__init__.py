"""Environments by name, vectorized stepping and reference scores."""
