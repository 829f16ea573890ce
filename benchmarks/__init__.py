"""Results, and in `harness` what measures them."""
