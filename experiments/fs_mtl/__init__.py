"""FS-MTL: sharpness-aware multi-task learning on overlaid digits and garments."""
