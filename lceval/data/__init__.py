"""What can be evaluated: lists of tasks, and fetching their data."""
