"""Checks of a package without its device: rules, compute plan, ranges; and the checks for a Mac."""
