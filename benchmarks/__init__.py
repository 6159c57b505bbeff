"""Scripts and helpers that check and time the layer. Not installed with the package."""
