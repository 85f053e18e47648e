"""Programs beside ours: their environments, the protocol of their processes, and rounds of engines in turns."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Writes each source backwards with an end token, and prints and ends as a bad library would.
BACKWARDS = """
import sys
from benchmarks.peers.protocol import by_length, serve

def open_engines(model, converted, max_new_tokens):
    print("a library says something")
    return {
        "whole": by_length(lambda batch: [[*source[::-1], 1, 0] for source in batch], 2),
        "ends": lambda sources: sys.exit("out of memory"),
    }

serve(open_engines)
"""


@pytest.fixture
def modules(monkeypatch):
    """The folder of benchmarks on the path, as for its programs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name in ("results", "peers") or name.startswith(("peers.", "generation_")):
            del sys.modules[name]


@pytest.fixture
def environments(modules, monkeypatch, tmp_path):
    """Environments of one program, ``quick``, in an empty cache; commands are noted and not run."""
    from peers import environments

    (tmp_path / "quick.txt").write_text("# a comment\nquick==1.0\n")
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setenv(environments.CACHE_VARIABLE, str(tmp_path / "cache"))
    return environments


@pytest.fixture
def commands(environments, monkeypatch):
    """The commands that would make an environment."""
    noted = []

    def note(*command, name):
        noted.append(command)
        (environments.cache_folder() / "environments" / name).mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(environments, "_run", note)
    return noted


@pytest.fixture
def backwards(modules, monkeypatch, tmp_path):
    """The module that starts programs, with one program, ``backwards``, in this environment."""
    import generation_peers

    folder = tmp_path / "benchmarks" / "peers"
    folder.mkdir(parents=True)
    shutil.copy(BENCHMARKS / "peers" / "protocol.py", folder)
    (folder / "backwards.py").write_text(BACKWARDS)
    (folder / "broken.py").write_text("raise SystemExit('no such processor')")
    monkeypatch.setattr(generation_peers, "ROOT", tmp_path)
    monkeypatch.setattr(generation_peers, "make", lambda name: Path(sys.executable))
    monkeypatch.setattr(generation_peers, "requirements", lambda name: {name: "1.0"})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return generation_peers


def test_every_program_has_pinned_requirements_and_every_requirement_file_a_program(modules):
    from peers import environments

    assert len(environments.names()) >= 3
    for name in environments.names():
        assert name in environments.requirements(name)
        assert (BENCHMARKS / "peers" / f"{name}.py").exists()


def test_a_requirement_without_a_version_is_refused(environments, tmp_path):
    (tmp_path / "quick.txt").write_text("quick==1.0\nloose>=2\n")
    with pytest.raises(environments.PeerError, match="loose>=2"):
        environments.requirements("quick")


def test_an_unknown_program_is_refused_with_the_known_ones(environments):
    with pytest.raises(environments.PeerError, match="expected one of quick"):
        environments.make("other")


def test_an_environment_is_made_once_and_again_when_its_file_changes(environments, commands, tmp_path):
    python = environments.make("quick")
    assert python == tmp_path / "cache" / "environments" / "quick" / "bin" / "python"
    assert [command[1:3] for command in commands] == [("-m", "venv"), ("-m", "pip")]
    environments.make("quick")
    assert len(commands) == 2
    (tmp_path / "quick.txt").write_text("quick==1.1\n")
    environments.make("quick")
    assert len(commands) == 4


def test_an_environment_that_failed_is_made_again(environments, commands, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(environments.PeerError):
        patch.setattr(environments, "_run", fail_with(environments.PeerError("no network")))
        environments.make("quick")
    environments.make("quick")
    assert len(commands) == 2


def test_a_command_that_fails_gives_a_reason_without_a_path_and_what_it_printed(environments, tmp_path):
    with pytest.raises(environments.PeerError, match="no such package") as raised:
        environments._run(sys.executable, "-c", "raise SystemExit('no such package')", name="quick")
    assert raised.value.reason == "the environment of quick cannot be made"


def test_a_program_writes_the_texts_in_the_order_of_the_sources_up_to_their_end_token(backwards, tmp_path):
    with backwards.open_peers(["backwards"], tmp_path, [(5, 6), (7, 8, 9), (4,)], 16, left_out := {}) as engines:
        written = engines["backwards, whole"]()
        again = engines["backwards, whole"]()
    assert written.ids == again.ids == [[6, 5, 1], [9, 8, 7, 1], [4, 1]]
    assert written.num_tokens == 9 and written.seconds >= 0 and left_out == {}


def test_a_program_that_cannot_start_is_left_out_with_its_status(backwards, tmp_path, capsys):
    names = ["broken", "backwards"]
    with backwards.open_peers(names, tmp_path, [(5, 6)], 16, left_out := {}) as engines:
        assert list(engines) == ["backwards, whole", "backwards, ends"]
    assert left_out == {"broken": "its program ended with status 1"}
    assert "no such processor" in capsys.readouterr().out


def test_an_engine_that_fails_within_the_rounds_is_left_out_and_the_others_continue(backwards, tmp_path, capsys):
    import generation_rounds

    own = {"own": lambda: generation_rounds.Written([[6, 5, 1]], 1.0)}
    with backwards.open_peers(["backwards"], tmp_path, [(5, 6)], 16, left_out := {}) as engines:
        written = generation_rounds.in_rounds(own | {"ends": engines["backwards, ends"]}, 2, left_out)
    assert list(written) == ["own"] and len(written["own"]) == 2
    assert left_out == {"ends": "its program ended with status 1"}
    assert "out of memory" in capsys.readouterr().out


def test_what_is_made_of_a_model_is_made_once_and_never_half(modules, tmp_path):
    from peers.protocol import made_once

    folder = tmp_path / "converted" / "quick"
    with pytest.raises(OSError, match="disk full"):
        made_once(folder, fail_with(OSError("disk full")))
    assert not folder.exists()
    for text in ("first", "second"):
        made_once(folder, lambda unfinished, text=text: (unfinished / "weights").write_text(text))
    assert (folder / "weights").read_text() == "first" and [path.name for path in folder.parent.iterdir()] == ["quick"]


def test_another_model_and_other_versions_are_converted_again(backwards, monkeypatch, tmp_path):
    keys = {backwards._key(tmp_path, "backwards")}
    (tmp_path / "model.safetensors").write_bytes(b"others")
    keys.add(backwards._key(tmp_path, "backwards"))
    monkeypatch.setattr(backwards, "requirements", lambda name: {name: "1.1"})
    assert len(keys | {backwards._key(tmp_path, "backwards")}) == 3


def test_rounds_alternate_between_the_engines(modules):
    from generation_rounds import Written, in_rounds

    order = []
    in_rounds({name: lambda name=name: order.append(name) or Written([[1]], 1.0) for name in "ab"}, 2, {})
    assert order == ["a", "b", "a", "b"]


def test_tokens_of_an_engine_are_those_of_its_own_texts_and_ratios_go_round_by_round(modules):
    from generation_rounds import Written, compare

    slow = [Written([[5, 1]], 1.0), Written([[5, 1]], 2.0)]
    fast = [Written([[5, 6, 7, 1]], 0.5), Written([[5, 6, 7, 1]], 0.5)]
    found = compare({"slow": slow, "fast": fast}, "slow")["fast"]
    assert found["tokens"] == 4 and found["ratio"]["each"] == [4.0, 8.0]


def test_a_text_that_differs_in_any_round_is_not_equal_and_its_first_place_is_given(modules):
    from generation_rounds import Written, equality

    reference = [[5, 6, 1], [7, 8, 1], [9, 9]]
    rounds = [Written([[5, 6, 1], [7, 8, 1], [9, 9, 9]], 1.0), Written([[5, 6, 1], [7, 4, 1], [9, 9, 9]], 1.0)]
    found = equality(reference, rounds, lambda index, place: index + place / 10)
    assert found["equal_texts"] == 1 and found["texts"] == 3
    assert found["differ_at"] == [{"token": 1, "margin": 1.1}, {"token": 2, "margin": 2.2}]
    assert json.dumps(found)


def fail_with(error):
    def fail(*arguments, **options):
        raise error

    return fail
