"""Look at label sets: summaries, verification, comparison, pictures and a page to browse."""
