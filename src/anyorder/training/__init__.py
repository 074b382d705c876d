"""Adaptation: curricula of factorizations, data, the objective, the trainer. Needs the `train` extra."""
