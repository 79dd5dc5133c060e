"""Teachers: images in, logits of every patch out. The only room that imports timm to annotate."""
