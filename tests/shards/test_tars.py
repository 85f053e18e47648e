"""A tar is read to its end, or refused by name: none of its questions is lost in silence."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import subprocess
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset as wds

from data_shards import tars
from data_shards.atomic_files import read_json, sha256_of_file
from data_shards.check import check_shards
from data_shards.errors import ShardError
from data_shards.index import build_index, read_index
from data_shards.indexed_tars import index_tars
from data_shards.sealed_json import commit_sealed
from mmcot.errors import InputError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = "a-folder-with-a-long-name/" * 6  # beyond the 100 bytes of a header


def question(number):
    return json.dumps(
        {"question": f"Which is bigger? {number}", "choices": ["sun", "moon"], "answer": number % 2}
    ).encode()


def add(tar, name, data, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(num=3, *, form="ustar", prefix="", **fields):
    """The bytes of a tar of questions, each a header and a block."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[form]) as tar:
        for number in range(num):
            add(tar, f"{prefix}q{number}.json", question(number), **fields)
    return stream.getvalue()


def rows_of(path, data):
    """What the index of a tar of these bytes says, with the bytes that it points to."""
    path.write_bytes(data)
    return [
        (row["qid"], row["extension"], data[row["offset"] : row["offset"] + row["size"]])
        for row in build_index(path).to_pylist()
    ]


def refuse(path, data, message):
    path.write_bytes(data)
    with pytest.raises(ShardError, match=message) as error:
        build_index(path)
    assert str(path) in str(error.value)


# Whole tars


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fields", [{}, {"mtime": 1700000000.25, "uid": 3_000_000, "uname": "jörg"}])
def test_every_format_of_python_is_read_whole(tmp_path, form, fields):
    data = make_tar(40, form=form, **({**fields, "mtime": 17, "uid": 3} if fields and form == "ustar" else fields))
    rows = rows_of(tmp_path / "a.tar", data)
    assert [row[0] for row in rows] == [f"q{number}" for number in range(40)] and rows[7][2] == question(7)


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_names_longer_than_a_header_are_read(tmp_path, form):
    assert [row[0] for row in rows_of(tmp_path / "a.tar", make_tar(form=form, prefix=LONG))] == ["q0", "q1", "q2"]


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
@pytest.mark.parametrize(
    "options",
    [(), ("-b", "1"), ("-b", "64"), ("--format=v7",), ("--format=ustar",), ("--format=posix",), ("--format=oldgnu",)],
)
def test_tars_of_the_tar_program_are_read(tmp_path, options):
    folder = tmp_path / ("in" if "v7" in str(options) else LONG.strip("/"))
    folder.mkdir(parents=True)
    for number in range(30):
        (folder / f"q{number}.json").write_bytes(question(number))
    subprocess.run(
        ["tar", *options, "-cf", "a.tar", "--sort=name", folder.relative_to(tmp_path).parts[0]],
        cwd=tmp_path,
        check=True,
    )
    rows = rows_of(tmp_path / "a.tar", (tmp_path / "a.tar").read_bytes())
    assert {row[0]: row[2] for row in rows} == {f"q{number}": question(number) for number in range(30)}


def test_tars_of_webdatasets_writer_are_read(tmp_path):
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(5):
            writer.write({"__key__": f"some/where/q{number}", "json": json.loads(question(number)), "png": b"picture"})
    rows = rows_of(tmp_path / "a.tar", (tmp_path / "a.tar").read_bytes())
    assert [row[:2] for row in rows] == [
        (f"q{number}", extension) for number in range(5) for extension in ("json", "png")
    ]


def test_git_archives_note_for_all_members_is_no_member(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "0123456789abcdef"}
    ) as tar:
        add(tar, "q0.json", question(0))
    assert len(rows_of(tmp_path / "a.tar", stream.getvalue())) == 1


def test_folders_in_a_tar_are_passed_over(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "folder", b"", type=tarfile.DIRTYPE)
        add(tar, "folder/q0.json", question(0))
    assert [row[0] for row in rows_of(tmp_path / "a.tar", stream.getvalue())] == ["q0"]


def test_archives_put_behind_each_other_give_all_their_questions_and_it_is_said(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "later.json", question(9))
    (tmp_path / "a.tar").write_bytes(make_tar(2) + stream.getvalue() + bytes(10_240))
    said = []
    manifest = index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out", report=said.append)
    assert manifest["num_samples"]["train"] == 3
    assert said == [f"{tmp_path / 'a.tar'} contains 2 concatenated archives; all of them are read"]


def test_more_or_fewer_zeros_behind_the_end_mark_are_no_damage(tmp_path):
    data = make_tar(2)
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    assert (
        rows_of(tmp_path / "a.tar", data[:end])
        == rows_of(tmp_path / "b.tar", data + bytes(99_999))
        == rows_of(tmp_path / "c.tar", data)
    )


def base_256(number):
    return b"\x80" + number.to_bytes(11, "big")


def with_size(data, size, at=0):
    """The tar with another size in the header at a byte, and the checksum that belongs to it."""
    header = bytearray(data[at : at + 512])
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def test_a_size_written_as_for_members_above_8_gb_is_read(tmp_path):
    data = make_tar(2)
    assert rows_of(tmp_path / "a.tar", with_size(data, base_256(len(question(0))))) == rows_of(tmp_path / "b.tar", data)


# Damage


@pytest.mark.parametrize(
    "size", [base_256(9 << 30), base_256(2**88 - 1), b"\xff" * 12, b"77777777777\0", b"-0000000001\0", b"00000030000\0"]
)
def test_a_member_larger_than_the_file_is_refused_by_name(tmp_path, size):
    refuse(
        tmp_path / "a.tar",
        with_size(make_tar(2), size),
        r"q0\.json.* has a size of -?[\d,]+ bytes .* the file ends at byte 10,240",
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [(b"12x", "no number of bytes"), (b"9999999999", "it was cut off or altered"), (b"9" * 400, "no number of bytes")],
)
def test_a_size_in_paxs_header_that_cannot_be_is_refused(tmp_path, size, message):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "q0.json", question(0), pax_headers={"size": size.decode()})
    refuse(tmp_path / "a.tar", stream.getvalue(), message)


@pytest.mark.parametrize("keep", [0, 1, 511])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, keep):
    refuse(tmp_path / "a.tar", make_tar()[:keep], "it is empty" if keep == 0 else "it ends at byte")


@pytest.mark.parametrize("form", FORMATS)
def test_a_tar_cut_anywhere_before_its_end_mark_is_refused(tmp_path, form):
    data = make_tar(4, form=form, prefix="" if form == "ustar" else LONG)
    end = -(-len(data.rstrip(b"\0")) // 512) * 512 + 1024
    places = {*range(0, end, 512), *range(511, end, 1024), *range(1, end, 1024), end - 1}
    for place in sorted(places):
        refuse(
            tmp_path / "a.tar",
            data[:place],
            "is not a readable tar: .*(cut off|is empty).*; write or fetch the shard again",
        )


def test_a_hole_of_zeros_is_refused(tmp_path):
    data = make_tar(30)
    for start in range(0, 12_288, 1024):  # every member is a header and a block
        for size in (512, 1024, 4096):
            if start + size != 10_240:  # see the next test
                refuse(tmp_path / "a.tar", data[:start] + bytes(size) + data[start + size :], r"zeros|a hole")


def test_a_hole_that_looks_like_the_gap_between_two_archives_is_told(tmp_path):
    data = make_tar(30)
    (tmp_path / "a.tar").write_bytes(data[: 10_240 - 4096] + bytes(4096) + data[10_240:])
    said = []
    build_index(tmp_path / "a.tar", report=said.append)
    assert len(said) == 1 and "contains 2 concatenated archives" in said[0]


@pytest.mark.parametrize("more", [b"x", b"<html>", make_tar(1), bytes(511) + b"x"])
def test_what_stands_behind_the_end_is_refused(tmp_path, more):
    data = make_tar(2)
    for gap in (512, 5000, 9728):
        refuse(tmp_path / "a.tar", data + bytes(gap) + more, "is none: a hole in the file, or something was added")


def test_rubbish_where_another_archive_could_begin_is_refused(tmp_path):
    for more in (b"x", b"<html>" * 200, make_tar(1)[:300]):
        refuse(tmp_path / "a.tar", make_tar(2) + more, "it ends at byte|behind an archive, at byte 10,240")
    refuse(tmp_path / "a.tar", make_tar(2) + make_tar(2)[:2048], "cut off")


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"V", b"?"]
)
def test_members_that_are_no_plain_files_are_refused_by_name_and_kind(tmp_path, kind):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "q0.json", question(0))
        add(tar, "q1.json", b"", type=kind, linkname="q0.json")
    refuse(tmp_path / "a.tar", stream.getvalue(), r"member 'q1\.json' is not of an allowed kind \((a |of type)")


def test_a_sparse_member_in_paxs_form_is_refused(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        add(
            tar,
            "q0.json",
            question(0),
            pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "q0.json"},
        )
    refuse(tmp_path / "a.tar", stream.getvalue(), r"not of an allowed kind \(a sparse file\)")


def test_a_compressed_tar_is_refused_with_what_it_is(tmp_path):
    refuse(tmp_path / "a.tar", gzip.compress(make_tar()), r"it is compressed \(gzip\); decompress it")


def test_a_name_that_is_no_text_is_refused(tmp_path):
    refuse(tmp_path / "a.tar", make_tar(form="gnu", prefix="\udcff"), "is no UTF-8")


def test_extended_headers_of_gigabytes_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "MAX_EXTENDED_BYTES", 100)
    refuse(
        tmp_path / "a.tar",
        make_tar(form="gnu", prefix=LONG),
        r"the extended header at byte 0 has \d+ bytes, expected 1 to 100",
    )


def extended_names(data):
    """The bytes of names in extended headers: they have no checksum, so that an altered letter cannot be found."""
    at = 0
    while data[at : at + 512].strip(b"\0"):
        size = int(data[at + 124 : at + 135], 8)
        if data[at + 156 : at + 157] in (b"L", b"x"):
            yield from range(at + 512 + data[at + 512 : at + 512 + size].find(b"=") + 1, at + 512 + size - 1)
        at += 512 + -(-size // 512) * 512


@pytest.mark.parametrize("form", FORMATS)
def test_no_altered_header_costs_a_question(tmp_path, form):
    data = make_tar(6, form=form, prefix="" if form == "ustar" else LONG)
    path = tmp_path / "a.tar"
    whole = rows_of(path, data)
    names = set(extended_names(data))
    content = {
        place for row in build_index(path).to_pylist() for place in range(row["offset"], row["offset"] + row["size"])
    }
    places = [place for place in range(len(data.rstrip(b"\0")) + 1600) if place not in names | content]
    num_refused = 0
    for place in random.Random(0).sample(places, 400):
        mutant = bytearray(data)
        mutant[place] ^= 1 << place % 8
        try:
            assert rows_of(path, bytes(mutant)) == whole
        except ShardError:
            num_refused += 1
    assert num_refused > 200


# Through the commands


def test_a_damaged_tar_leaves_no_finished_data_folder(tmp_path):
    (tmp_path / "a.tar").write_bytes(make_tar(3))
    index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(make_tar(3)[:2048])
    with pytest.raises(ShardError, match="a.tar is not a readable tar"):
        index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out")
    assert not (tmp_path / "out" / "text" / "manifest.json").exists()


@pytest.mark.parametrize("damage", ["cut off", "behind an archive"])
def test_check_finds_a_tar_of_which_a_part_was_indexed(tmp_path, damage):
    """An index of a third of a tar, with a manifest that agrees: what versions before this one wrote."""
    whole = make_tar(30)
    (tmp_path / "a.tar").write_bytes(whole)
    index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out")
    damaged = whole[:10_240] if damage == "cut off" else whole[: 10_240 - 1024] + bytes(1024) + b"?" + whole[10_241:]
    (tmp_path / "a.tar").write_bytes(damaged)
    index = tmp_path / "out" / "text" / "train-000000.parquet"
    pq.write_table(read_index(index).slice(0, 9), index)
    manifest = read_json(tmp_path / "out" / "text" / "manifest.json")
    manifest["shards"][0] |= {
        "num_samples": 9,
        "sha256": sha256_of_file(tmp_path / "a.tar"),
        "size_bytes": len(damaged),
        "index_sha256": None,
    }
    manifest["num_samples"]["train"] = 9
    commit_sealed(tmp_path / "out" / "text" / "manifest.json", manifest)
    with pytest.raises(ShardError, match=rf"a.tar is not a readable tar: .*{damage}"):
        list(check_shards(tmp_path / "out"))


def test_check_finds_an_index_that_is_not_the_tars(tmp_path):
    (tmp_path / "a.tar").write_bytes(make_tar(3))
    index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out")
    index = tmp_path / "out" / "text" / "train-000000.parquet"
    table = read_index(index)
    pq.write_table(table.set_column(0, "qid", [["q0", "q2", "q1"]]), index)
    path = tmp_path / "out" / "text" / "manifest.json"
    manifest = read_json(path)
    manifest["shards"][0]["index_sha256"] = None  # as of an earlier version
    commit_sealed(path, manifest)
    with pytest.raises(ShardError, match="does not list the 3 members of .*a.tar"):
        list(check_shards(tmp_path / "out"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{oops", "no valid JSON"),
        (b"\xff", "the byte 0xff is no UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", r"expected an object .* found '\[1, 2\]'"),
        (b"7", "expected an object"),
        (b'{"question": "Who?"}', "the field 'choices' is missing"),
        (b'{"question": "Who?", "choices": ["a", "b"], "answer": null}', "the answer is missing"),
    ],
)
def test_a_member_that_is_no_question_is_named_with_its_tar(tmp_path, content, message):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "q0.json", question(0))
        add(tar, "q1.json", content)
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=rf"a\.tar, member q1\.json: .*{message}"):
        index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out")


def test_members_of_no_question_are_counted(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in {
            "q0.json": question(0),
            "q0.png": b"",
            "orphan.png": b"",
            "other.npy": b"",
            "other.png": b"",
        }.items():
            add(tar, name, data)
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    said = []
    index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out", report=said.append)
    assert len(said) == 1 and "members of 2 names belong to no question, such as those of 'orphan'" in said[0]


def test_an_id_that_comes_twice_is_named(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("x/0001.json", "y/0001.json"):
            add(tar, name, question(0))
    (tmp_path / "a.tar").write_bytes(stream.getvalue())
    with pytest.raises(InputError, match=r"a.tar, member 0001.json: the id '0001' is also .* without folders"):
        index_tars({"train": [tmp_path / "a.tar"]}, tmp_path / "out")
