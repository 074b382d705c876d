"""How good a model is: tasks of our own, controls (`baselines`), and lm-evaluation-harness's backend (`harness`)."""
