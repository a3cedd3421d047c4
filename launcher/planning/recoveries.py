"""What recovering variants takes: each is a training of its own, under its share of the budget. Torch-free."""

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import NonNegativeInt

from compression.config import RecoverConfig
from compression.recipe import Recipe, grid
from compression.recovery import start_point
from compression.reduced import reduced_config
from launcher.planning.choices import choose, needs, remedies, roomiest
from launcher.planning.cluster import Cluster
from launcher.planning.disk import start_bytes
from launcher.planning.layouts import Case, Choice, best_layout
from launcher.planning.planned import PlannedRun, TooSmall, first_guess, planned_run
from launcher.problems import Problem, SpecError
from launcher.spec import CandidateSpec, JobSpec
from parallelism.accounting import train_flops_per_sequence
from parallelism.budget import Budget
from parallelism.layout import Layout
from parallelism.models.base import ModelConfig
from parallelism.rules import resolve_training
from parallelism.training import TrainingConfig

WARMUP_FRACTION = 0.1


class RecoveryPlan(PlannedRun):
    """The recovery of one variant of a candidate."""

    recipe: str
    """Name of the recovered recipe."""
    disk_bytes: NonNegativeInt
    """The weights it begins with, and its checkpoints."""


def plan_recoveries(
    spec: JobSpec,
    candidate: CandidateSpec,
    model: ModelConfig,
    layout: Layout | None,
    training: TrainingConfig,
    cluster: Cluster,
) -> list[RecoveryPlan]:
    """The plans of a candidate's recoveries, in the order of the grid.

    ``layout`` and ``training`` are those of the candidate's own training; of a model that exists, what its spec says.
    Raises :class:`launcher.problems.SpecError`, with fields of the whole job.
    """
    recover = spec.compression.recover
    if recover is None:
        return []
    planner = _Planner(spec, recover, candidate, model, layout, training, cluster)
    return [planner.plan(recipe) for recipe in grid(spec.compression) if recipe.recovered]


@dataclass
class _Planner:
    """Plans recoveries of one candidate; what recipes share is chosen once."""

    spec: JobSpec
    recover: RecoverConfig
    candidate: CandidateSpec
    model: ModelConfig
    layout: Layout | None
    training: TrainingConfig
    cluster: Cluster
    _choices: dict[tuple[Any, ...], Choice] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        """Of each recovery."""
        return self.spec.training_budget.share(self.recover.budget_fraction)

    def plan(self, recipe: Recipe) -> RecoveryPlan:
        """The plan of one recovery."""
        case = self._case(recipe)
        try:
            run = planned_run(self.spec, case, self.budget, self._choice(recipe, case), self.cluster)
        except TooSmall as error:
            hint = f"raise it, or budget.{self.budget.unit}"
            what = f"recovering {self._whose(recipe)}: {error}"
            problem = Problem("compression.recover.budget_fraction", self.recover.budget_fraction, what, hint)
            raise SpecError([problem]) from error
        disk = start_bytes(case.model) + (run.checkpoint.keep + 1) * run.checkpoint_bytes
        facts = {name: getattr(run, name) for name in PlannedRun.model_fields}
        return RecoveryPlan(recipe=recipe.name, disk_bytes=disk, **facts)

    def _case(self, recipe: Recipe) -> Case:
        """As the candidate was trained, at a lower rate and with a batch for the share of the budget.

        The batch does not depend on the layout, so that a recovery can go on at another one.
        """
        length, kind = self.spec.data.sequence_length, self.cluster.device_kind
        model = reduced_config(self.model, recipe.structure)
        teacher = self.model if self.recover.distill else None
        per_token = train_flops_per_sequence(model, length, teacher) / length
        tokens = first_guess(self.spec, self.budget, per_token, self.cluster)
        asked = self.training.model_copy(update={"micro_batch": 1})
        if self.budget.counts_progress:
            asked = asked.model_copy(update={"global_batch": "auto"})
        training = resolve_training(asked, model, Layout(), length, tokens, kind)
        assert isinstance(training.learning_rate, float)
        gentle = {
            "learning_rate": training.learning_rate * self.recover.learning_rate_fraction,
            "warmup_fraction": WARMUP_FRACTION,
            "schedule": "cosine",
            "prune": None,
        }
        return Case(
            model,
            training.model_copy(update=gentle),
            self._free(),
            length,
            self.budget.unit in ("device_hours", "cost"),
            # Neither the checkpoints nor the widths of single matrices are known yet, and neither matters here.
            start_point(recipe, "", self.recover, teacher="", strengths={}),
            teacher,
        )

    def _free(self) -> frozenset[str]:
        given = self.candidate.training
        free = {name for name in ("global_batch", "precision") if getattr(given, name) == "auto"} | {"micro_batch"}
        return frozenset(free if "recompute" in given.model_fields_set else free | {"recompute"})

    def _choice(self, recipe: Recipe, case: Case) -> Choice:
        assert case.start is not None
        rounding = case.start.rounding
        key = (case.model, rounding is not None, rounding.group_size if rounding else None)
        if key not in self._choices:
            self._choices[key] = self._chosen(recipe, case)
        return self._choices[key]

    def _chosen(self, recipe: Recipe, case: Case) -> Choice:
        """At the candidate's layout, or, where a recovery cannot be had or does not fit there, at the best one."""
        if self.layout is not None:
            with suppress(SpecError):
                return choose(case, self.layout, self.cluster)
        try:
            return choose(case, None, self.cluster)
        except SpecError as error:
            raise SpecError([self._refusal(recipe, case)]) from error

    def _refusal(self, recipe: Recipe, case: Case) -> Problem:
        assert case.start is not None
        taken = needs(case, self.cluster, roomiest(case, self.cluster), case.training)
        what = f"recovering {self._whose(recipe)} fits on {self.cluster.devices} devices at no layout: {taken}"
        without = {
            "distill": replace(case, teacher=None),
            "quantization_aware": replace(case, start=case.start.model_copy(update={"rounding": None})),
        }
        found = [
            f"set compression.recover.{name}: false"
            for name, other in without.items()
            if getattr(self.recover, name) and best_layout(other, self.cluster)
        ]
        hints = [*found, *remedies(case, self.cluster, given=False), "leave it out of compression.recover.recipes"]
        return Problem("compression.recover", None, what, ", or ".join(hints))

    def _whose(self, recipe: Recipe) -> str:
        plain = recipe.model_copy(update={"recovered": False, "quantization_aware": False})
        return f"{plain.name} of candidate {self.candidate.name!r}"
