"""Compares alternating with joint task steps at matched learning rates."""
