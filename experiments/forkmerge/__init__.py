"""ForkMerge on digits of five domains: the effect of auxiliary tasks on a target."""
