"""Core ML weight formats: palettes and linear forms."""
