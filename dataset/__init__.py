"""Read label maps. Needs neither Ray nor timm nor click."""

from tokenlabel.dataset.errors import FormatError, TokenLabelError

__all__ = ["FormatError", "TokenLabelError"]
