"""A run folder answers: predictions, scores, calibration, prediction files."""
