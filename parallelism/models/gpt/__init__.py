"""Family ``gpt``: decoder-only language models in the styles of GPT-2 and Llama."""
