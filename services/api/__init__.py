"""The REST API: jobs, what becomes of them, and what they leave."""
