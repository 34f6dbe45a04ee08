"""`lceval report`: one HTML page from any runs, with its data, its plots and its plotting library inside.

`data` computes plain values from the runs, `page` puts values and templates into one file.
"""
