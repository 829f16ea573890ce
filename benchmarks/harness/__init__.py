"""What measures: speed against peers, scans, lock-step evaluation, LLM demonstrations."""
