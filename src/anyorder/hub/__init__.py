"""Names, files, caches."""
