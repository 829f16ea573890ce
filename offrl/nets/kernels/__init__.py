"""Compiled and measured kernels: matrix products, chains of them, scans, GELU."""
