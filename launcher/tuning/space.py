"""The search space of a tuning, as written in YAML, checked before the first trial.

    tuning:
      space:
        training.learning_rate: {loguniform: [1.0e-5, 1.0e-2]}
        training.weight_decay: {uniform: [0.0, 0.1]}
        training.warmup_steps: {randint: [0, 200]}            # without the last
        model.shape.d_ff: {choice: [128, 256]}
        run.seed: {grid: [0, 1, 2]}                            # every one of them

A name is the name of any setting. The values at the edges of every range are validated by the schema.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.config.chains import CHAINS, RATIONALE
from launcher.config.loading import parse_settings, set_value
from launcher.config.settings import SPACE_KINDS, Settings, SettingsError

_MAX_CORNERS = 256


def check_space(settings: Settings) -> None:
    """Validate the edges of the space as settings.

    Raises:
        SettingsError: a name is unknown, a range is not valid, or a value is not allowed.
    """
    space = settings.tuning.space
    if settings.tuning.stage not in (*settings.chain.stage_names, "pipeline"):
        raise SettingsError(
            f"tuning.stage {settings.tuning.stage!r} is no stage of run.chain {settings.run.chain}; expected one of "
            f"{', '.join(settings.chain.stage_names)}, or pipeline"
        )
    _check_scheduler(settings)
    for arm in settings.tuning.arms:
        with_values(settings, {"arm": arm})
    if not space and not settings.tuning.arms:
        raise SettingsError(
            "tuning.space is empty; give settings to search, such as training.learning_rate: "
            f"{{loguniform: [1.0e-5, 1.0e-2]}} ({', '.join(SPACE_KINDS)})"
        )
    edges = {name: _edges(name, spec) for name, spec in space.items()}
    corners = itertools.product(*edges.values())
    for corner in itertools.islice(corners, _MAX_CORNERS):
        with_values(settings, dict(zip(edges, corner, strict=True)))
    for name, values in edges.items():  # every value once, if there are more corners than the limit
        for value in values:
            with_values(settings, {name: value})


def _check_scheduler(settings: Settings) -> None:
    """Check that the scheduler fits the number of steps of the stage that it watches."""
    tuning = settings.tuning
    if tuning.scheduler != "asha":
        return
    num_steps = settings.stage(settings.watched_stage).num_steps
    if num_steps is None:
        raise SettingsError(
            f"tuning.scheduler asha counts steps; give {settings.watched_stage}.num_steps instead of num_epochs"
        )
    if tuning.grace_steps and tuning.grace_steps > num_steps:
        raise SettingsError(
            f"tuning.grace_steps {tuning.grace_steps:,} is more than {settings.watched_stage}.num_steps {num_steps:,}: "
            f"no trial could be ended early; give at most {num_steps:,}"
        )


def without_arm(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a trial by the names of settings: ``arm`` is replaced by the values of that arm."""
    own = {name: value for name, value in values.items() if name != "arm"}
    return settings.tuning.arms[values["arm"]] | own if "arm" in values else own


def with_values(settings: Settings, values: Mapping[str, Any]) -> Settings:
    """The settings of a trial: those of the tuning, overridden by ``values``; ``arm`` adds the values of an arm."""
    values = without_arm(settings, values)
    plain = settings.model_dump()
    plain["tuning"] = {}
    chain = values.get("run.chain", settings.run.chain)
    if isinstance(chain, str) and chain != settings.run.chain:  # validation names what is no text
        known = CHAINS[chain].stage_names if chain in CHAINS else ()  # validation names an unknown one
        plain["stages"] = {name: section for name, section in plain["stages"].items() if name in known}
        for name in settings.stage_sections:
            if f"{name}.format" not in values and name != RATIONALE:  # whose format also that of gold rationales
                section = plain.get(name) or plain["stages"].get(name, {})
                section.pop("format", None)  # the default of the chain is used
    for name, value in values.items():
        plain = set_value(plain, name, value)
    return parse_settings(plain)


def _edges(name: str, spec: Any) -> Sequence[Any]:
    if not isinstance(spec, dict) or len(spec) != 1 or next(iter(spec)) not in SPACE_KINDS:
        raise SettingsError(
            f"setting tuning.space {name}: {spec!r} must be one of {', '.join(SPACE_KINDS)}, such as "
            "{loguniform: [1.0e-5, 1.0e-2]}"
        )
    ((kind, values),) = spec.items()
    if not isinstance(values, list) or not values:
        raise SettingsError(f"setting tuning.space {name}: {kind} needs a list, got {values!r}")
    if kind in ("choice", "grid"):
        return values
    if len(values) != 2 or not all(isinstance(value, (int, float)) for value in values) or values[0] >= values[1]:
        raise SettingsError(
            f"setting tuning.space {name}: {kind} needs [low, high] as numbers (write 1.0e-5, not 1e-5), got {values!r}"
        )
    if kind == "loguniform" and values[0] <= 0:
        raise SettingsError(f"setting tuning.space {name}: loguniform needs a low above 0, got {values[0]}")
    return [values[0], values[1] - 1] if kind == "randint" else values
