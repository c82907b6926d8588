"""The model's inputs: pictures, conversations, prompts and drawn scenes."""
