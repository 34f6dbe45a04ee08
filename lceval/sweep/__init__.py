"""`lceval sweep`: a grid of run folders, each as `lceval run` makes it.

`grid` reads what is asked for, `plan` turns it into cells, `local` runs them: cells that differ only in their recipe
share one model and read each context once.
"""
