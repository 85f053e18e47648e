"""The folder of a local Ray is its user's alone."""

from __future__ import annotations

import errno
import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from launcher.cluster.private_folder import private_ray_folder
from launcher.cluster.ray_session import ray_session
from launcher.config.loading import load_settings


@pytest.fixture
def place(monkeypatch):
    """A short folder that RAY_TMPDIR names."""
    with tempfile.TemporaryDirectory(prefix="p-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_the_folder_lies_in_one_that_only_its_user_may_enter_whatever_the_umask(place):
    before = os.umask(0)
    try:
        folder = private_ray_folder()
    finally:
        os.umask(before)
    assert folder == f"{place}/mmcot-{os.getuid()}/r" and mode(Path(folder).parent) == 0o700
    Path(folder).parent.chmod(0o755)
    assert private_ray_folder() == folder and mode(Path(folder).parent) == 0o700


def test_a_name_that_somebody_else_took_is_not_used(place):
    theirs = place / "theirs"
    theirs.mkdir(mode=0o777)
    (place / f"mmcot-{os.getuid()}").symlink_to(theirs)
    folder = Path(private_ray_folder()).parent
    assert folder.parent == place and folder.name.startswith("mmcot-") and not folder.is_symlink()
    assert mode(folder) == 0o700 and list(theirs.iterdir()) == []


def test_where_others_can_exchange_folders_or_the_path_is_too_long_for_a_socket_tmp_is_used(place, monkeypatch):
    place.chmod(0o777)  # without the sticky bit
    assert private_ray_folder() == f"/tmp/mmcot-{os.getuid()}/r"
    place.chmod(0o1777)
    assert private_ray_folder() == f"{place}/mmcot-{os.getuid()}/r"
    monkeypatch.setenv("RAY_TMPDIR", str(place / ("long" * 20)))
    assert private_ray_folder() == f"/tmp/mmcot-{os.getuid()}/r"
    (place / "short").symlink_to(place / ("long" * 20))
    monkeypatch.setenv("RAY_TMPDIR", str(place / "short"))  # how a long folder is given on purpose
    assert private_ray_folder() == f"{place}/short/mmcot-{os.getuid()}/r"


def error_of(user, path):
    """What a process of another user meets that connects to a socket; 0 where it can."""
    if (pid := os.fork()) == 0:
        os.setgid(user)
        os.setuid(user)
        os._exit(socket.socket(socket.AF_UNIX).connect_ex(str(path)))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.ray
@pytest.mark.processes
def test_no_other_user_reaches_a_local_rays_sockets(place):
    place.chmod(0o755)
    with ray_session(load_settings(preset="demo").cluster):
        sockets = [path for path in place.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]
        assert {"raylet", "plasma_store"} <= {path.name for path in sockets}
        assert all(len(os.fsencode(path)) <= 107 for path in sockets)
        assert mode(sockets[0].parent) == 0o777  # as Ray makes it, so that what is around it must be closed
        assert {mode(folder) for folder in place.iterdir()} == {0o700}
        if os.geteuid() == 0:
            raylet = next(path for path in sockets if path.name == "raylet")
            assert error_of(0, raylet) == 0 and error_of(65534, raylet) == errno.EACCES
