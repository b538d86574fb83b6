"""FS-MTL: sharpness-aware learning on overlaid digits and garments."""
