"""``python -m mtljax`` prints the tables of all methods and wrappers."""

from mtljax.catalogue import WRAPPERS, wrappers_table
from mtljax.methods import METHODS, methods_table

print(methods_table())
print()
print(wrappers_table())
print(f"\n{len(METHODS)} methods and {len(WRAPPERS)} wrappers.")
