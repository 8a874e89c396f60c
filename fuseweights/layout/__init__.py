"""Fused or restored tensors → the files of one container. One module a container."""
