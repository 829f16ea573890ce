"""Compiled and measured kernels: products, scans, GELU."""
