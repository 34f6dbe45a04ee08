"""`lceval sweep`: a grid of run folders, each as `lceval run` makes it.

`grid` reads what is asked for, `plan` turns it into cells, `cost` says what they take, and an `engine` runs them: here,
in several `processes` or on a `cluster`. A `worker` runs cells that differ only in their recipe over one loaded model
and one reading of each context.
"""
