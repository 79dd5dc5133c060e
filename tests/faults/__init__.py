"""Real faults against real processes and files; `make soak` runs them for an hour."""
