"""IGB: effect of improvable gaps and of an agent compared with log losses."""
