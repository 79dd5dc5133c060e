"""Names of classes for people."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path


class ClassNames:
    """Names of a label set's classes: WordNet ids become words."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = names

    def __getitem__(self, class_id: int) -> str:
        if not self._names or not 0 <= class_id < len(self._names):
            return str(class_id)
        name = self._names[class_id]
        words = _words().get(name)
        return words.split(",")[0] if words else name  # of the synonyms, the first


@cache
def _words() -> dict[str, str]:
    """Synonyms by WordNet id, from the list that timm ships.

    Read without importing timm, which takes seconds and 700 MB with the torch that it imports.
    """
    spec = importlib.util.find_spec("timm")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(place) / "data" / "_info" / "imagenet_synset_to_lemma.txt"
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            return {wnid: words for wnid, _, words in (line.partition("\t") for line in lines)}
    return {}
