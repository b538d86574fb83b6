"""What several experiments need: options, runs, selection, statistics, reports."""
