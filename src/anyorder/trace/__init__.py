"""What decoding did: recorded, shown live, drawn."""
