"""Gramian engine: stages of a program, recognised operations and contractions."""
