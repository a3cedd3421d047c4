"""Devices that are asked of a Ray cluster together, and what it lacks while they are not held. Torch-free."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

SILENT_SECONDS, WAITING_SECONDS = 5.0, 60.0
"""How long somebody may wait for devices without a word, and how often it is said why from then on."""

Bundle = dict[str, float]
"""Resource → amount, on one node."""


class Reservation:
    """A placement group: all bundles, each on one node, or none. Methods return at once."""

    def __init__(self, bundles: Sequence[Bundle]) -> None:
        self._bundles = list(bundles)
        self._complain_at = time.monotonic() + SILENT_SECONDS
        self._told = False
        self._ask()

    def _ask(self) -> None:
        self._placement: Any = placement_group(self._bundles, strategy="PACK")

    def held(self) -> bool:
        """Whether all of it is held."""
        return bool(placement_group_table(self._placement)["state"] == "CREATED")

    def complaint(self) -> str | None:
        """What the cluster lacks, while :meth:`held` is false; None where it is not time to say so (again).

        What seems to be free and was not given for so long is asked for anew: Ray may have lost the request.
        """
        now = time.monotonic()
        if now < self._complain_at:
            return None
        told_before, self._complain_at = self._told, now + WAITING_SECONDS
        self._told = True
        wanted, free, total = self._wanted(), ray.available_resources(), ray.cluster_resources()
        if told_before and all(free.get(kind, 0) >= wanted[kind] for kind in wanted):
            self.give_back()
            self._ask()
        parts = [f"{wanted[kind]:g} {kind} ({free.get(kind, 0):g} of {total.get(kind, 0):g} free)" for kind in wanted]
        count = len(self._bundles)
        spread = f" in {count} bundles of one node each" if count > 1 else " on one node"
        return f"{' and '.join(parts)}{spread}"

    def place(self, bundle: int = 0) -> PlacementGroupSchedulingStrategy:
        """Where an actor has to be put to use a bundle."""
        return PlacementGroupSchedulingStrategy(self._placement, bundle)

    def give_back(self) -> None:
        """Also ends what is still placed in it."""
        remove_placement_group(self._placement)

    def _wanted(self) -> Bundle:
        return {kind: sum(bundle[kind] for bundle in self._bundles) for kind in self._bundles[0]}
