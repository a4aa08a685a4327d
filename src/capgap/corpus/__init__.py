"""Text in, tokens out: sources, tokenizer, token shards, batches. Imports no torch."""
