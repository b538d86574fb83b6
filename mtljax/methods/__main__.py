"""``python -m mtljax.methods`` prints the table of methods."""

from mtljax.methods import methods_table

print(methods_table())
