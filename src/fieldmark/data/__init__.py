"""Files become upright RGB pixels."""
