"""Decoders side by side: speed, and the quality of what they write, in one run."""
