"""Documents in a job's journal that the service writes: whose the job is, and that its record was removed."""

RECORD = "service"
"""What only the store knows of a job otherwise, should the store be lost."""
FORGOTTEN = "forgotten"
"""Its record was removed: it is not taken up again."""
