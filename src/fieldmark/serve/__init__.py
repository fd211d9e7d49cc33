"""HTTP and web pages over a predictor."""
