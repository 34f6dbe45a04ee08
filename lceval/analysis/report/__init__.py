"""`lceval report`: one standalone HTML page of any runs, with data, plots and plotting library included.

`data` computes plain values from the runs; `page` renders values and templates into one file.
"""
