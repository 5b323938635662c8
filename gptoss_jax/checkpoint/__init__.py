"""Checkpoints in and out: Hugging Face and OpenAI safetensors directories."""
