"""`lceval sweep`: a grid of run folders, each like one of `lceval run`.

`grid` reads the grid, `plan` lists its cells, `cost` estimates their cost, and an `engine` runs them: in this process,
in several `processes` or on a `cluster`. A `worker` runs cells that differ only in their recipe with one loaded model
and one prefill per context.
"""
