"""The leaderboard: every balancer on many small data sets, tuned alike."""
