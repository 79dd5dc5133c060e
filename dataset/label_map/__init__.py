"""A label map as the leaf that follows its image through torchvision's v2 transforms."""

# No map may exist without its kernels, or torchvision would flip it as the Mask that it also is.
from . import kernels as kernels
