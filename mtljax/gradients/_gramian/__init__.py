"""Parts of the Gramian engine: a program, its stages, known uses, contractions."""
