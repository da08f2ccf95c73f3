"""`longdream play` and `longdream watch`: a dream to step into beside reality, and runs to follow, in a browser."""
