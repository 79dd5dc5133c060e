"""Backbones of students: how to get the patch tokens of timm, torchvision and transformers."""
