"""ForkMerge on digits of five domains: one target, auxiliary tasks."""
