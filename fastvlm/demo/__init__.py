"""The demo checkpoint: its training and the page of its answers."""
