"""What goes into the model: pictures, conversations, pixels, prompts and drawn scenes.

Imports `fastvlm.common`.
"""
