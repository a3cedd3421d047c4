"""What people touch: the command line (and, later, the REST API). Never imports torch."""
