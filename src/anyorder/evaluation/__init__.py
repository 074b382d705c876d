"""Evaluation: tasks with exact likelihoods, infilling, controls, and the backend of lm-evaluation-harness."""
