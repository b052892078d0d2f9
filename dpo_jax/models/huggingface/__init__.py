"""Hugging Face model folders and hub: read and written as safetensors only."""
