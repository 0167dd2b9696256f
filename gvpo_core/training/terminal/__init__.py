"""Text for a terminal: short numbers, printable text, output that may be closed."""
