"""Data only: what may be stacked, under which name, in which order, and who loads the result."""
