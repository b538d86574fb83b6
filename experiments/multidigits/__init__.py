"""The main job: many methods on real overlaid digits, side by side."""
