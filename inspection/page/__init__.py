"""A page to browse label sets: one HTML file that needs no network and no server."""
