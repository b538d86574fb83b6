"""IGB: what improvable gaps and an agent add to log losses, with few and many tasks."""
