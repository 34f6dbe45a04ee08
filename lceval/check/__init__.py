"""`lceval check`: fails a build on a real regression, and not on noise."""
