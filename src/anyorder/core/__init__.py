"""Index arithmetic: factorizations, rows, random numbers, checks. No transformers."""
