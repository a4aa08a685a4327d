"""Hugging Face causal language models: shapes, the ladder of sizes, building and loading."""
