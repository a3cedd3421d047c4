"""What is wrong with a recipe, in words a user can act on. Torch-free."""


class RecipeError(ValueError):
    """A recipe that cannot be carried out.

    ``field`` is the dotted path below ``compression`` in the job file (``quantize.group_size``), ``value`` what stands
    there, ``problem`` what is wrong with it, and ``remedy`` what would work. The message holds all four.
    """

    def __init__(self, field: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(" ".join(str(part) for part in (field, value, problem) if part != "") + f": {remedy}")
        self.field = field
        self.value = value
        self.problem = problem
        self.remedy = remedy
