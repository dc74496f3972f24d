"""Random programs on virtual time, run on the real limiter and watched at every step."""
