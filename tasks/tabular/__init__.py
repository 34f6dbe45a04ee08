"""Tables: the class or the value of a row, from other rows of its table shown as examples."""
