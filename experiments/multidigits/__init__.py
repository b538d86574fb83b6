"""The main experiment: many methods on real overlaid digits."""
