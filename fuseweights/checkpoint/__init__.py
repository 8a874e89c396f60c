"""Checkpoints as names, types and spans of bytes. Knows nothing of fusing."""
