"""Look at label sets: summaries, verification, comparison, single images and a page to browse."""
