"""Where a job's Ray cluster comes from; one file each."""
