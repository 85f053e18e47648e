"""Room for the workers of a training on a Ray cluster, reserved by placement groups."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_shards.atomic_files import commit_json, read_json
from launcher.config.settings import Cluster

FEWER_AFTER_S = 10.0  # of waiting for all workers, where fewer are allowed
GIVE_BACK_AFTER_S = 60.0  # of waiting with some places reserved
SAY_EVERY_S = 30.0
_LOOK_EVERY_S = 0.1


class PlacesLost(RuntimeError):  # noqa: N818, as the errors of lost ranks
    """Places are no longer reserved, or their nodes no longer there; to reserve again may help."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Room for one worker: a bundle of a placement group, and the node on which it is."""

    group: str  # the id of the placement group
    bundle: int
    node: str


class Reservation:
    """Processors and GPUs for ``cluster.num_workers`` workers; with ``cluster.min_workers``, for as many as there are.

    Ray reserves another place where a node is lost, and the missing ones as soon as nodes join.

    Args:
        note: a file for the ids of the placement groups and its own place, for ``release``.
    """

    def __init__(self, cluster: Cluster, note: Path) -> None:
        self._wanted, self._note = cluster.num_workers, note
        self._least = cluster.min_workers or cluster.num_workers
        self._sizes = [1] * self._wanted if cluster.min_workers else [self._wanted]
        self._bundle = {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if cluster.use_gpu else {})
        self._groups: list[Any] = []
        self._reserve()

    def _reserve(self) -> None:
        from ray.util.placement_group import placement_group

        self._groups = [placement_group([self._bundle] * size) for size in self._sizes]
        try:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            commit_json(self._note, {"file": str(self._note.absolute()), "groups": self._ids()})
        except BaseException:
            self.close()
            raise

    def _ids(self) -> list[str]:
        return [group.id.hex() for group in self._groups]

    def places(self) -> list[Place]:
        """Return the places that are reserved at present, those of one node beside each other."""
        import ray
        from ray.util.placement_group import placement_group_table

        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        found = []
        for group in self._groups:
            table = placement_group_table(group)
            if table.get("state") == "CREATED":
                nodes = table["bundles_to_node_id"]
                found += [Place(group.id.hex(), int(bundle), node) for bundle, node in nodes.items() if node in alive]
        first = {place.node: -number for number, place in enumerate(reversed(found))}
        return sorted(found, key=lambda place: first[place.node])

    def wait(self, report: Callable[[str], None], check: Callable[[], None]) -> list[Place]:
        """Return the places once all are reserved, or after some seconds those that are, if they are enough.

        Args:
            check: called now and then; an error of it ends the wait.

        Raises:
            PlacesLost: what was reserved was given back by another process.
        """
        started = said = reserved = time.monotonic()
        while True:
            check()
            places, now = self.places(), time.monotonic()
            enough = self._least <= len(places) and now - started > FEWER_AFTER_S
            if len(places) == self._wanted or enough:
                return places
            if self._were_given_back():
                raise PlacesLost("the places of the workers were given back by another process")
            if places and now - reserved > GIVE_BACK_AFTER_S:  # two trainings could each wait for what the other holds
                self.close()
                time.sleep(random.uniform(1.0, 10.0))
                self._reserve()
                reserved = time.monotonic()
            if now - said > SAY_EVERY_S:
                said = now
                needs = " and ".join(f"{number:g} {name}" for name, number in self._bundle.items())
                report(
                    f"  waiting for room on the cluster: {len(places)} of {self._wanted} workers have a place, each "
                    f"needs {needs}; `ray status` shows what is in use"
                )
            time.sleep(_LOOK_EVERY_S)

    def _were_given_back(self) -> bool:
        from ray.util.placement_group import placement_group_table

        return any(placement_group_table(group).get("state", "REMOVED") == "REMOVED" for group in self._groups)

    def strategy(self, place: Place) -> Any:
        """Return what places an actor there."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = next(group for group in self._groups if group.id.hex() == place.group)
        return PlacementGroupSchedulingStrategy(group, place.bundle)

    def close(self) -> None:
        """Give the places back; Ray ends what runs there."""
        from ray.util.placement_group import remove_placement_group

        ids, groups, self._groups = self._ids(), self._groups, []
        for group in groups:
            remove_placement_group(group)
        if reserved_by(self._note) == ids:  # not those of a later attempt
            self._note.unlink(missing_ok=True)


def release(note: Path) -> None:
    """Give back the places whose ids a reservation has written into a file, from any process of the cluster."""
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    for name in reserved_by(note):
        remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))
    note.unlink(missing_ok=True)


def reserved_by(note: Path) -> list[str]:
    """Return the ids in a reservation's file; none where the file came with a copied or moved folder.

    What such a file names is reserved by the process that wrote it, in the first folder.
    """
    with contextlib.suppress(FileNotFoundError, ValueError):  # a file of an earlier version is no JSON
        content = read_json(note)
        if isinstance(content, dict) and content["file"] == str(note.absolute()):
            return content["groups"]
    return []
