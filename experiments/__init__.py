"""Experiments: one folder a question. They use the library and never each other."""
