"""Shared by the experiments: options, runs, selection, statistics and reports."""
