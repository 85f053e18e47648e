"""Shards behind a URL: a real S3 server, and an HTTP server that misbehaves."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import shutil
import socket
import threading
import urllib.parse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_shards import http_redirects, mirror
from data_shards import remote_files as remote
from data_shards.errors import ShardError
from data_shards.indexed_tars import index_tars
from data_shards.manifest import manifest_shards, read_manifest
from data_shards.plan import Plan
from data_shards.range_requests import plan_ranges
from data_shards.reader import SplitReader
from data_shards.sealed_json import sealed
from data_shards.shard_cache import ShardCache
from data_shards.shard_files import RemoteAccess
from data_shards.stream import walk_steps
from launcher.config.settings import SettingsError
from launcher.data.build import prepare_data
from launcher.data.check import check_data


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with ranges; the first ``failures`` requests of a tar fail."""

    failures, ranges = 0, True
    requests: list[str] = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path.endswith(".tar") and _Handler.failures > 0:
            _Handler.failures -= 1
            self.send_error(503)
            return
        asked = self.headers.get("Range")
        if asked is None or not self.ranges:
            super().do_GET()
            return
        with open(self.translate_path(self.path), "rb") as file:
            data = file.read()
        start, stop = (int(number) for number in asked.removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{stop}/{len(data)}")
        self.send_header("Content-Length", str(len(data[start : stop + 1])))
        self.end_headers()
        self.wfile.write(data[start : stop + 1])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web(tiny_data, tmp_path, monkeypatch):
    """A copy of the tiny data folder behind HTTP; yields (URL, folder)."""
    folder = tmp_path / "served"
    shutil.copytree(tiny_data.path, folder)
    monkeypatch.setattr(_Handler, "failures", 0)
    monkeypatch.setattr(_Handler, "ranges", True)
    monkeypatch.setattr(_Handler, "requests", [])
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def open_remote(url, cache_dir, mode, split="train", **access):
    folder = mirror.mirror_folder(url, cache_dir, features="patch")
    return SplitReader(folder, split, features="patch", access=RemoteAccess(mode, str(cache_dir), **access))


def assert_same(reader, expected, samples):
    for sample in samples:
        assert reader.problem(sample) == expected.problem(sample)
        np.testing.assert_array_equal(reader.features(sample), expected.features(sample))


@pytest.mark.parametrize("mode", ["ranges", "cache"])
def test_a_folder_in_s3_reads_as_the_local_one(s3, tiny_data, tmp_path, mode):
    reader, expected = open_remote(s3, tmp_path, mode), SplitReader(tiny_data.path, "train", features="patch")
    assert len(reader) == 64 and list(reader.qids) == list(expected.qids)
    assert_same(reader, expected, [5, 63, 5, 30])  # without announcing
    samples = np.random.default_rng(0).permutation(64)
    reader.prefetch(samples[:32])
    reader.prefetch(samples[32:])
    assert_same(reader, expected, samples)
    reader.close()


def test_whole_shards_are_fetched_once_for_all_readers_of_a_machine(s3, tiny_data, tmp_path):
    first, second = (open_remote(s3, tmp_path, "cache") for _ in range(2))
    expected = SplitReader(tiny_data.path, "train", features="patch")
    for reader in (first, second):
        assert_same(reader, expected, range(64))
    size = sum(
        shard.size_bytes
        for kind in ("text", "features/patch")
        for shard in manifest_shards(read_manifest(tiny_data.path / kind), "train")
    )
    assert first.bytes_read >= size and second.bytes_read == 0
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 6


def test_the_cache_stays_within_its_bound_and_lets_the_longest_unused_go(s3, tmp_path):
    shards = manifest_shards(
        read_manifest(mirror.mirror_folder(s3, tmp_path, features="patch") / "features" / "patch"), "train"
    )
    cache = ShardCache(tmp_path, max_bytes=int(2.5 * shards[0].size_bytes))
    sizes = []
    for shard in [*shards, shards[-1], shards[0]]:
        descriptor, fetched = cache.open(shard.path, sha256=shard.sha256, size=shard.size_bytes)
        os.close(descriptor)
        sizes.append(fetched)
    assert sizes == [shards[0].size_bytes, shards[1].size_bytes, shards[2].size_bytes, 0, shards[0].size_bytes]
    assert sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")) <= cache.max_bytes
    with pytest.raises(ShardError, match="data.cache_gb allows 0.0"):
        ShardCache(tmp_path, max_bytes=1000).open(shards[0].path, sha256="0" * 64, size=shards[0].size_bytes)


def test_many_threads_share_a_cache_that_holds_few_shards(web, tmp_path):
    url, _folder = web
    shards = manifest_shards(
        read_manifest(mirror.mirror_folder(url, tmp_path, features="patch") / "features" / "patch")
    )
    cache = ShardCache(tmp_path, max_bytes=int(2.5 * max(shard.size_bytes for shard in shards)))

    def read(number):
        shard = shards[number % len(shards)]
        descriptor, _ = cache.open(shard.path, sha256=shard.sha256, size=shard.size_bytes)
        with os.fdopen(descriptor, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest() == shard.sha256

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(read, range(80)))
    assert sum(path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")) <= cache.max_bytes


def test_names_that_lead_out_of_a_folder_are_refused(web, tmp_path):
    url, folder = web
    path = folder / "text" / "manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in (
        ({"name": "../../x"}, "names a shard '../../x'"),
        ({"sha256": "../../x"}, "gives '../../x' as sha256"),
    ):
        shards = [{**shard, **change} for shard in manifest["shards"]]
        path.write_text(json.dumps(sealed({**manifest, "shards": shards})))
        with pytest.raises(ShardError, match=message):
            SplitReader(
                mirror.mirror_folder(url, tmp_path, features=None), "train", access=RemoteAccess("cache", str(tmp_path))
            ).problem(0)


class _Counting:
    """Samples for a walker that only reads."""

    is_remote = True

    def __init__(self, reader):
        self.reader = reader

    def __getattr__(self, name):
        return getattr(self.reader, name)

    def load_block(self, samples, is_dummy, epoch):
        return [
            (self.reader.qid(sample), self.reader.problem(sample), self.reader.features(sample)) for sample in samples
        ]


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_ranges_bring_little_more_than_is_needed_at_any_world_size(s3, tmp_path, world_size):
    def plan(epoch):
        counts = [24, 24, 16]
        return Plan(
            np.ones(64),
            np.ones(64),
            np.repeat(np.arange(3), counts),
            seed=0,
            epoch=epoch,
            global_batch_size=8,
            micro_batch_size=1,
            window_shards=2,
        )

    read = needed = 0
    qids = []
    for rank in range(world_size):
        reader = open_remote(s3, tmp_path, "ranges")
        for columns_of in (reader._text.columns, reader._features.columns):
            for shard in range(3):
                columns_of(shard)
        before = reader.bytes_read  # indexes are small beside shards of a usual size
        steps = list(walk_steps(plan, _Counting(reader), rank=rank, world_size=world_size, steps=range(8)))
        qids += [qid for step in steps for _, block in step.blocks for qid, *_ in block]
        read, needed = read + reader.bytes_read - before, needed + reader.bytes_needed
        reader.close()
    assert sorted(qids) == sorted(reader.qids)
    assert 1.0 <= read / needed <= 1.2


def test_members_that_lie_close_share_a_request_and_far_ones_do_not():
    offsets, sizes = np.array([512, 11_264, 900_000, 512, 21_504]), np.array([10_000, 10_000, 10_000, 100, 100])
    ranges, of_member = plan_ranges(np.array([0, 0, 0, 1, 0]), offsets, sizes)
    assert ranges.tolist() == [[0, 512, 21_604], [0, 900_000, 910_000], [1, 512, 612]] and of_member.tolist() == [
        0,
        0,
        1,
        2,
        0,
    ]


def test_a_server_that_fails_for_a_while_is_asked_again(web, tiny_data, tmp_path):
    url, _ = web
    reader, expected = open_remote(url, tmp_path, "ranges"), SplitReader(tiny_data.path, "train", features="patch")
    _Handler.failures = 3
    assert_same(reader, expected, [0, 40])
    _Handler.failures = 3
    assert_same(open_remote(url, tmp_path, "cache"), expected, [0, 40])


def test_a_server_that_stays_away_is_named_with_its_last_answer(web, tmp_path):
    url, _ = web
    reader = open_remote(url, tmp_path, "ranges")
    _Handler.failures = 1000
    with pytest.raises(ShardError, match=r"text/train-000000.tar could not be read in 5 tries; the last error: .*503"):
        reader.problem(0)


def test_a_server_without_ranges_is_told_from_one_with(web, tmp_path):
    url, _ = web
    _Handler.ranges = False
    with pytest.raises(ShardError, match="does not serve ranges .* set data.remote=cache"):
        open_remote(url, tmp_path, "ranges").problem(0)
    assert open_remote(url, tmp_path, "cache").problem(0)


def test_altered_bytes_behind_a_url_are_found_in_both_modes(web, tmp_path):
    url, folder = web
    readers = {mode: open_remote(url, tmp_path, mode) for mode in ("ranges", "cache")}
    tar = folder / "text" / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    readers["ranges"].prefetch(np.arange(8))
    with pytest.raises(ShardError, match="are not those that were indexed"):
        readers["ranges"].problem(0)
    with pytest.raises(ShardError, match="its manifest has"):
        readers["cache"].problem(0)


@pytest.mark.parametrize("url", ["ssh://host/data", "pipe://cat", "s3://a/b::file://c"])
def test_other_protocols_are_refused(url, tmp_path):
    with pytest.raises(ShardError, match="is not of a protocol that is read"):
        mirror.mirror_folder(url, tmp_path, features=None)


def test_a_url_without_a_finished_folder_says_so(s3, tmp_path):
    with pytest.raises(ShardError, match=r"s3://bucket/nothing/text/manifest.json does not exist"):
        mirror.mirror_folder("s3://bucket/nothing", tmp_path, features=None)


def test_tars_are_indexed_behind_a_url_and_read_from_there(s3, tiny_data, tmp_path):
    tars = {split: remote.list_urls(f"{s3}/text/{split}-*.tar") for split in ("train", "val", "test")}
    assert [url.rpartition("/")[2] for url in tars["train"]] == [f"train-00000{n}.tar" for n in range(3)]
    manifest = index_tars(tars, tmp_path / "mine")
    assert manifest["num_samples"] == tiny_data.text["num_samples"]
    assert [shard["sha256"] for shard in manifest["shards"]] == [shard["sha256"] for shard in tiny_data.text["shards"]]
    reader = SplitReader(tmp_path / "mine", "train")
    assert reader.problem(30) == SplitReader(tiny_data.path, "train").problem(30)


def test_a_remote_folder_is_checked_and_prepared_as_it_is(s3, tiny_settings, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_data(s3, lambda line: None, features="patch") == 192
    data = tiny_settings.data.model_copy(update={"shards_dir": s3, "cache_dir": str(tmp_path / "cache")})
    folder = prepare_data(tiny_settings.model_copy(update={"data": data}), lambda line: None)
    assert folder.location == s3 and folder.is_remote and folder.fingerprints() == tiny_data.fingerprints()
    with pytest.raises(SettingsError, match="data.path .* would not be read"):
        prepare_data(
            tiny_settings.model_copy(update={"data": data.model_copy(update={"path": "x"})}), lambda line: None
        )


# Redirects


class _Redirecting(http.server.BaseHTTPRequestHandler):
    """Answers /to?URL with a redirect to URL, and everything else with 4 bytes."""

    seen: list[str] = []

    def do_GET(self):
        self.seen.append(f"{self.connection.getsockname()[0]}{self.path}")
        where, _, target = self.path.partition("?")
        self.send_response(302 if where == "/to" else 200)
        if where == "/to":
            self.send_header("Location", urllib.parse.unquote(target))
        self.send_header("Content-Length", "0" if where == "/to" else "4")
        self.end_headers()
        if where != "/to" and self.command == "GET":
            self.wfile.write(b"data")

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def redirecting(monkeypatch):
    """A server on all of 127.0.0.0/8, of which 127.0.1.x count as public; yields its port and what it was asked."""
    really = http_redirects.is_private
    monkeypatch.setattr(http_redirects, "is_private", lambda ip: really(ip) and not ip.startswith("127.0.1."))
    monkeypatch.setattr(_Redirecting, "seen", [])
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.01)
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), _Redirecting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port, _Redirecting.seen
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "http://2130706433:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "http://10.1.2.3/secret",
        "http://172.16.0.1/secret",
        "http://192.168.1.1/secret",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]:{port}/secret",
        "http://[fc00::1]/secret",
        "http://127.0.1.2:{port}/to?http://127.0.0.1:{port}/secret",
        "ftp://127.0.1.2/secret",
        "file:///etc/passwd",
    ],
)
@pytest.mark.parametrize("read", ["read_file", "read_range", "fetch_file"])
def test_a_redirect_of_a_public_server_to_a_private_address_or_another_protocol_is_refused(
    redirecting, tmp_path, target, read
):
    port, seen = redirecting
    url = f"http://127.0.1.1:{port}/to?{target.format(port=port).replace('::', '%3A%3A')}"  # :: would be a chain
    arguments = {"read_range": (0, 4), "fetch_file": (tmp_path / "copy",)}.get(read, ())
    with pytest.raises(ShardError, match="redirects to .* such a redirect is not followed"):
        getattr(remote, read)(url, *arguments)
    assert not [request for request in seen if request.startswith(("127.0.0.1", "::"))]
    assert len([request for request in seen if request.startswith("127.0.1.1")]) <= 2  # not tried again
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_lists_files_is_not_read_from_a_private_address(redirecting):
    port, seen = redirecting
    with pytest.raises(ShardError, match="redirects to 127.0.0.1, which is a private address"):
        remote.list_urls(f"http://127.0.1.1:{port}/to?http://127.0.0.1:{port}/*.tar")
    assert not [request for request in seen if request.startswith("127.0.0.1")]


def test_a_redirect_on_the_same_server_or_to_another_public_one_is_followed(redirecting, tmp_path):
    port, seen = redirecting
    for target in ("/here", f"http://127.0.1.2:{port}/here"):
        url = f"http://127.0.1.1:{port}/to?{target}"
        assert remote.read_file(url) == b"data"
        remote.fetch_file(url, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == b"data"
    assert "127.0.1.2/here" in seen


def test_a_private_server_of_ones_own_may_redirect_to_another_until_it_leads_out(redirecting):
    port, seen = redirecting
    assert remote.read_file(f"http://127.0.0.1:{port}/to?http://127.0.0.2:{port}/here") == b"data"
    out_and_in = f"http://127.0.1.1:{port}/to?http://127.0.0.3:{port}/secret"
    with pytest.raises(ShardError, match="127.0.1.1 redirects to 127.0.0.3, which is a private address"):
        remote.read_file(f"http://127.0.0.1:{port}/to?{out_and_in}")
    assert not [request for request in seen if request.startswith("127.0.0.3")]


def test_a_name_that_changes_to_a_private_address_after_the_check_is_refused(redirecting, monkeypatch):
    port, seen = redirecting
    answers = iter(["127.0.1.2"])
    real = socket.getaddrinfo

    def changing(host, *arguments, **options):
        host = next(answers, "127.0.0.1") if host == "changing.example" else host
        return real(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    with pytest.raises(ShardError, match="which now has a private address"):
        remote.read_file(f"http://127.0.1.1:{port}/to?http://changing.example:{port}/secret")
    assert not [request for request in seen if request.startswith("127.0.0.1")]


@pytest.mark.parametrize(
    ("address", "private"),
    [
        ("8.8.8.8", False),
        ("2001:4860:4860::8888", False),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("fe80::1%eth0", True),
    ],
)
def test_addresses_of_the_internet_are_public_and_all_others_private(address, private):
    assert http_redirects.is_private(address) is private
