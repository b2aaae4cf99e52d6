"""Offline: a Hugging Face checkpoint, or random weights, to a model package."""
