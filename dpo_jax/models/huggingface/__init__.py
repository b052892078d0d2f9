"""Hugging Face folders in and out: safetensors only."""
