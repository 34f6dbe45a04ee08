"""What everything else uses: errors, paths, files and the options of commands."""
