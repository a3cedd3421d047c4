"""MLflow as a picture of the journal: one process for each job feeds it. Torch-free."""
