"""Controls: other objectives on the same backbone, data and tokens."""
