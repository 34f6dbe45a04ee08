"""Tabular in-context learning: predict the class or value of a row from labelled rows of its table."""
