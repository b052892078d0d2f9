"""HTML pages of runs, data, win rates and frontiers."""
