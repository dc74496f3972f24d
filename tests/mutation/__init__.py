"""Shows that the checks can fail: the core is broken on purpose, and that has to be found."""
