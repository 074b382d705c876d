"""One forward of rows in an unmodified decoder."""
