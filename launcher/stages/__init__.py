"""The stages of a job, one module each; a stage is a function of the job's context that may be repeated at any time."""
