"""Where images come from: one protocol, a module for each kind of source. No torch."""
