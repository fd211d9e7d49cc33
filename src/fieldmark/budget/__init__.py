"""The best classifier that fits a number of minutes: measured, raced, fine-tuned where it pays, and on time."""
