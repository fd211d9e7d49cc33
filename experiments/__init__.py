"""What the recipes were chosen by: grids that were trained, and the claims they were held against."""
