"""Pipelines for images with label maps, and the augmentations of other libraries."""
