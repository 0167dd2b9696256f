"""Text for a terminal: short numbers, escaped text, and output streams that may be closed."""
