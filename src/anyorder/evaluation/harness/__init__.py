"""The backend for lm-evaluation-harness, so that other people's tasks can be asked in any order.

`lm_eval` is the one module that imports the harness. What it is made of knows no harness: `settings` (what users may
choose), `encoding` (text to ids), `likelihoods` (ids to scores), `continuations` (prompts to text).
"""
