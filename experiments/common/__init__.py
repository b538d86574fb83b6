"""Options, runs, selection, statistics and reports of all experiments."""
