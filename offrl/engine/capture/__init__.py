"""Updates captured once and replayed."""
