"""`lceval report`: one HTML page from any runs, with its data, its plots and its plotting library inside.

`data` computes plain values from the runs, `paired` sets a run beside its own `full`, `page` puts values and templates
into one file.
"""
