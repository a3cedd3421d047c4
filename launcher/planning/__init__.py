"""What a job will need and whether it can run: spec, cluster, layouts, costs, the plan. Torch-free."""
