"""Pixels become logits."""
