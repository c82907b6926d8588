"""One report of all that only a Mac can verify."""
