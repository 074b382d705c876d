"""Adaptation: curricula of factorizations, data, the trainer. Needs the `train` extra."""
