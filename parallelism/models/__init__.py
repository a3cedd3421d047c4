"""Model families. The single-device model is plain; how it is spread stands beside it in the engines."""
