"""Sweeps: one config over a grid or a search, several seeds each, members of one program side by side."""
