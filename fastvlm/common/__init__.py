"""Shared by every room: the command line, errors, files, processes, terminal output, pages and plots."""
