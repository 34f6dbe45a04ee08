"""What everything else uses: errors, paths, files, text tables and the options of commands."""
