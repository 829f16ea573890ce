"""Adapters that run `offrl.regularizers` inside other trainers; hosts are imported lazily."""
