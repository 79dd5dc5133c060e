"""An image with its label map, drawn as a PNG."""
