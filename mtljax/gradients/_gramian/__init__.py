"""Gramian engine: stages of a program, known operations, contractions."""
