"""Learning, for any model and any loader."""
