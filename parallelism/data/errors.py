"""What is wrong with a job's data, in words a user can act on. Torch-free."""


class DataError(ValueError):
    """Data that cannot be used as asked.

    ``field`` is the dotted path in the job file (``data.validation``), ``value`` what stands there, ``problem`` what is
    wrong and what would work. The message holds all three.
    """

    def __init__(self, field: str, value: object, problem: str) -> None:
        super().__init__(f"{field}: {value!r}: {problem}")
        self.field = field
        self.value = value
        self.problem = problem
