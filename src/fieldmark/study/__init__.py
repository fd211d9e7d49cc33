"""Many runs from one recipe, and what they show together."""
