"""Read label maps. Needs neither Ray nor timm nor click."""

from tokenlabel.dataset.errors import FormatError, TokenLabelError
from tokenlabel.dataset.store import LabelStore, MissingMapError, ScoreMap

__all__ = ["FormatError", "LabelStore", "MissingMapError", "ScoreMap", "TokenLabelError"]
