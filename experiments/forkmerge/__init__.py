"""ForkMerge on digits of five domains: what of auxiliary tasks does it keep?"""
