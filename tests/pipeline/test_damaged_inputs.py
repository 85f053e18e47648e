"""No damage to an input is a traceback, a hang or a silent loss (``tests/helpers/mutant_law.py`` has the law).

A mutant is repeated alone by its seed: ``python tests/helpers/mutant_law.py 17``.
"""

from __future__ import annotations

import os

import pytest
from damaged_inputs import make_inputs
from mutant_law import Trials

NUM_QUICK, NUM_ALL = 200, 2000


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    root, before = tmp_path_factory.mktemp("damaged"), os.getcwd()
    os.chdir(root)
    yield Trials(make_inputs(root))
    os.chdir(before)


@pytest.mark.parametrize("first", range(0, NUM_QUICK, 20))
def test_damage_to_an_input_is_refused_with_file_and_remedy_or_changes_nothing(trials, first):
    broken = [str(found) for seed in range(first, first + 20) for found in trials.trial(seed)[3]]
    assert not broken, "\n\n".join(broken)


@pytest.mark.slow
def test_two_thousand_damages_to_inputs_are_refused_with_file_and_remedy_or_change_nothing(trials):
    broken = [str(found) for seed in range(NUM_ALL) for found in trials.trial(seed)[3]]
    assert not broken, f"{len(broken)} of {NUM_ALL}:\n" + "\n\n".join(broken[:20])
