"""Carry out training steps of a model at a layout; all write and read the same checkpoint."""
