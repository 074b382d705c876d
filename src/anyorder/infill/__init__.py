"""Text with blanks -> text."""
