"""What leaves the project: predictions, figures, reports, exported models."""
