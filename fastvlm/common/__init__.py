"""What every room uses: the command line, errors, files, threads, terminal output, page and number formats.

Imports nothing else of this project.
"""
