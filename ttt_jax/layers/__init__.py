"""Layers: thin Linen modules and the pure functions under them."""
