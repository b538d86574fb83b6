"""Alternating task steps against joint ones, learning rates matched."""
