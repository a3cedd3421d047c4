"""Text in, token batches out: sources, tokenizers, the indexed format, and a deterministic order."""
