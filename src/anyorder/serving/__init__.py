"""Many requests at a time on one model, and the APIs that clients and editors speak."""
