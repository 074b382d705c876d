"""How good a model is, by other people's yardsticks: the backend for lm-evaluation-harness.

`lm_eval` is the one module that imports the harness. What it is made of knows no harness: `settings` (what users may
choose), `encoding` (text to ids), `likelihoods` (ids to scores), `continuations` (prompts to text), `batches`.
"""
