"""A run folder becomes a model that other programs run, with proof that it gives the same answers."""
