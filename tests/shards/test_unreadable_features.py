"""Published features that cannot be used are named for what they are, with what to do."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch

from data_shards.indexed_tars import index_tars
from data_shards.reader import SplitReader
from launcher.config.settings import Data
from launcher.data.published_features import open_ready_made
from mmcot.errors import InputError
from mmcot.texts.sample import Sample

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 1141234\n"
ARRAY = np.random.default_rng(0).standard_normal((3, 2, 4)).astype(np.float32)
MAP = '{"a": "0", "b": "1", "c": "2"}'
FORBIDDEN = ("allow_pickle", "weights_only", "Weights only", "Traceback")  # words of libraries that advise pickles


def saved(save, value, **options):
    stream = io.BytesIO()
    save(stream, value, **options)
    return stream.getvalue()


def npy(array, **options):
    return saved(np.save, array, **options)


def pth(value, **options):
    return saved(lambda stream, value, **options: torch.save(value, stream, **options), value, **options)


def old_pth(value):
    return pth(value, _use_new_zipfile_serialization=False)


def tar_of(data):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.npy"), io.BytesIO(data))
    return stream.getvalue()


def open_features(folder, name, data, name_map=MAP):
    (folder / name).write_bytes(data)
    (folder / "name_map.json").write_text(name_map)
    return open_ready_made(Data(features="mine", vision_features=str(folder)))


def features_of(folder, name, data):
    read, shape = open_features(folder, name, data)
    samples = [Sample(qid=qid, question="?", choices=("a", "b"), answer=0, images=("p.png",)) for qid in "abc"]
    return np.stack([read(sample, Counter()) for sample in samples]), shape


ANYTHING = {
    "a Git LFS pointer .it stands for 1,141,234 bytes.*git lfs pull": LFS,
    r"is empty \(0 bytes\).*download it again": b"",
    "an HTML or XML page of .*login": b"\n<!DOCTYPE html><html>Sign in</html>",
    "an HTML or XML page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a gzip file.*gunzip": gzip.compress(npy(ARRAY)),
    "a tar archive.*unpack": tar_of(npy(ARRAY)),
    "a JSON file that starts with": b'{"rows": []}',
    "a text file that starts with": b"0.1 0.2 0.3\n",
}
OF_NPY = {
    "a zip archive": saved(np.savez, ARRAY),
    "is cut off: 100 bytes, its header alone has 128": npy(ARRAY)[:100],
    "is cut off: 200 bytes, its header says 224": npy(ARRAY)[:200],
    "Python objects, which are pickles and never loaded": npy(np.array([1, "a"], object)),
    "a pickle of Python, which is never loaded": pickle.dumps(ARRAY),
    "type int64, expected float16": npy(ARRAY.astype(np.int64)),
    r"shape \(3,\)": npy(ARRAY[:, 0, 0]),
}
OF_PTH = {
    "is cut off: 300 bytes of a zip archive": pth(torch.from_numpy(ARRAY))[:300],
    "is cut off: 400 bytes, expected .* at least": old_pth(torch.ones(2, 3, 4))[:400],
    "holds Python objects, such as numpy._core.multiarray._reconstruct,": pth(ARRAY),
    "Python objects, such as numpy._core.multiarray._reconstruct, that": old_pth(ARRAY),
    "a pickle of Python, which is never loaded": pickle.dumps(ARRAY),
    "a zip archive that torch.save did not write": saved(np.savez, ARRAY),
    r"holds a dict of 2 \(keys 'x', 'y'\)": pth({"x": torch.ones(2), "y": 1}),
    r"holds a list of 2 \(Tensor, int\)": old_pth([torch.ones(2), 1]),
    r"holds a tuple of 1 \(Tensor\)": pth((torch.ones(2),)),
    "values of torch.int64": pth(torch.ones(3, 2, 4, dtype=torch.int64)),
    "a tensor of torch.sparse_coo": pth(torch.ones(3, 2, 4).to_sparse()),
}


@pytest.mark.parametrize(
    ("name", "message", "data"),
    [
        *(
            pytest.param("mine.npy", message, data, id=f"npy {message}")
            for message, data in (ANYTHING | OF_NPY).items()
        ),
        *(
            pytest.param("mine.pth", message, data, id=f"pth {message}")
            for message, data in (ANYTHING | OF_PTH).items()
        ),
    ],
)
def test_a_file_that_is_something_else_is_named_for_what_it_is(name, message, data, tmp_path):
    with pytest.raises(InputError, match=message) as raised:
        open_features(tmp_path, name, data)
    said = str(raised.value)
    assert str(tmp_path / name) in said and not any(word in said for word in FORBIDDEN)


@pytest.mark.parametrize("length", [1, 2, 9, 20, 60, 120, 250])
@pytest.mark.parametrize("save", [pth, old_pth])
def test_a_file_of_torch_that_is_cut_anywhere_is_an_error_of_ours(save, length, tmp_path):
    with pytest.raises(InputError, match="mine.pth"):
        open_features(tmp_path, "mine.pth", save(torch.from_numpy(ARRAY))[:length])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("mine.npy", npy(np.asfortranarray(ARRAY))),
        ("mine.npy", npy(ARRAY.astype(">f4"))),
        ("mine.npy", npy(ARRAY.astype(np.float64))),
        ("mine.npy", npy(ARRAY.astype(np.float16))),
        ("mine.pth", pth(torch.from_numpy(ARRAY))),
        ("mine.pth", old_pth(torch.from_numpy(ARRAY))),
        ("mine.pth", pth(torch.nn.Parameter(torch.from_numpy(ARRAY)))),
        ("mine.pth", pth(torch.from_numpy(ARRAY).double())),
        ("mine.pth", pth(torch.from_numpy(ARRAY).permute(2, 0, 1).contiguous().permute(1, 2, 0))),
    ],
)
def test_every_form_of_a_file_gives_the_same_features(name, data, tmp_path):
    found, shape = features_of(tmp_path, name, data)
    assert shape == (2, 4)
    np.testing.assert_array_equal(found, ARRAY.astype(np.float16))


@pytest.mark.parametrize(
    "value", ["null", "1.0", "-1", '"-1"', '"x"', '""', "true", "[1]", '"1.0"', '"' + "9" * 30 + '"']
)
def test_a_row_that_is_no_number_is_named_with_file_and_key(value, tmp_path):
    with pytest.raises(InputError, match=r"name_map\.json, key 'b': the row is .*expected a number") as raised:
        open_features(tmp_path, "mine.npy", npy(ARRAY), f'{{"a": "0", "b": {value}}}')
    assert raised.value.file == str(tmp_path / "name_map.json")


def test_all_rows_that_are_no_numbers_are_named_together(tmp_path):
    with pytest.raises(InputError, match=r"(?s)key 'a'.*key 'b'.*2 faults in all"):
        open_features(tmp_path, "mine.npy", npy(ARRAY), '{"a": null, "b": -3, "c": 1}')


@pytest.mark.parametrize(
    ("name_map", "message"),
    [
        ('{"a": "0", "b": "3"}', r"has 3 rows, .*name_map\.json names 1 beyond them \(question b: row 3\)"),
        ('{"a": "0", "a": "1"}', r"name_map\.json: the key 'a' occurs more than once"),
        ('["a", "b"]', r"name_map\.json holds a value of type list, expected an object"),
        ("7", r"name_map\.json holds a value of type int, expected an object"),
        (LFS.decode(), r"name_map\.json is a Git LFS pointer.*git lfs pull"),
        ("<html>", r"name_map\.json is an HTML or XML page"),
        ("", r"name_map\.json is empty"),
        ('{"a": "0", ', r"name_map\.json is no valid JSON at line 1.*cut off"),
    ],
)
def test_a_map_that_cannot_be_is_named(name_map, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_features(tmp_path, "mine.npy", npy(ARRAY), name_map)


def test_rows_may_be_numbers_of_json_too(tmp_path):
    read, _ = open_features(tmp_path, "mine.npy", npy(ARRAY), '{"a": 2}')
    sample = Sample(qid="a", question="?", choices=("a", "b"), answer=0)
    np.testing.assert_array_equal(read(sample, Counter()), ARRAY[2].astype(np.float16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pooled_row_that_is_not_finite_is_said_to_be_so(value, tmp_path):
    array = np.repeat(np.ones((20, 1, 4), np.float32), 3, axis=1)
    array[18, 1, 2] = value
    name_map = json.dumps({f"q{row}": row for row in range(20)})
    read, _ = open_features(tmp_path, "mine.npy", npy(array), name_map)
    with pytest.raises(InputError, match=r"mine\.npy, row 18 \(question q18\) holds NaN"):
        read(Sample(qid="q18", question="?", choices=("a", "b"), answer=0), Counter())


# Arrays in a user's tars


def index(folder, data):
    row = {"question": "?", "choices": ["a", "b"], "answer": 0}
    path = folder / "t.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in (("a.json", json.dumps(row).encode()), ("a.npy", data)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    index_tars({"train": [path]}, folder / "out", features="mine", report=lambda line: None)
    return SplitReader(folder / "out", "train", features="mine")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_every_form_of_an_array_in_a_tar_is_indexed_and_read(version, order, dtype, tmp_path):
    stream = io.BytesIO()
    array = np.array(np.arange(12).reshape(3, 4), dtype, order=order)
    np.lib.format.write_array(stream, array, version=version)
    np.testing.assert_array_equal(index(tmp_path, stream.getvalue()).features(0), array)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.array([[np.nan]])), "features contain NaN or infinite values"),
        (npy(np.array([[1e300]])), "values beyond float32"),
        (npy(np.array([[3]])), "type int64, expected float16"),
        (npy(np.ones(3)), r"features of shape \(3,\), expected \[patches, width\]"),
        (npy(np.array([["a"]], object)), "Python objects, which are pickles"),
        (npy(np.ones((2, 3)))[:-4], "is cut off"),
        (LFS, "is a Git LFS pointer"),
        (b"", r"0 bytes that start with"),
    ],
)
def test_an_array_in_a_tar_that_cannot_be_used_is_named_with_tar_and_member(data, message, tmp_path):
    with pytest.raises(Exception, match=rf"t\.tar, member a\.npy:?,? .*{message}"):
        index(tmp_path, data)
