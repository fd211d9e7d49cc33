"""Fieldmark: train the best photo classifier your time can buy, know which choices earned it, and use it."""
