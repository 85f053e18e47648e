"""Arrays in numpy's format are read in every version, order and byte order, and anything else is named."""

from __future__ import annotations

import io
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.npy import NpyError, open_npy, parse_npy

VALUES = np.arange(24).reshape(4, 6) / 4


def npy(array, version=(1, 0)):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=True)
    return stream.getvalue()


def with_header(text, values=b"\0" * 16):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1") + values


def read(how, data, folder):
    if how == "bytes":
        return parse_npy(data, name="t.tar, member a.npy")
    (folder / "a.npy").write_bytes(data)
    return open_npy(folder / "a.npy")


@pytest.mark.parametrize("how", ["bytes", "file"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4", ">f8"])
def test_every_form_gives_the_same_values(how, version, order, dtype, tmp_path):
    array = read(how, npy(np.array(VALUES, dtype, order=order), version), tmp_path)
    np.testing.assert_array_equal(array, VALUES)
    assert array.dtype.itemsize == np.dtype(dtype).itemsize


def test_bytes_become_an_array_in_c_order_of_this_machines_byte_order():
    array = parse_npy(npy(np.array(VALUES, ">f4", order="F")), name="a")
    assert array.flags.c_contiguous and array.dtype.isnative


@pytest.mark.parametrize("how", ["bytes", "file"])
@pytest.mark.parametrize("shape", [(0, 6), (0,), (3, 0, 2)])
def test_an_array_without_values_keeps_its_shape(how, shape, tmp_path):
    assert read(how, npy(np.zeros(shape, np.float16)), tmp_path).shape == shape


@pytest.mark.parametrize("how", ["bytes", "file"])
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(3), "type int64, expected float16, float32 or float64; convert"),
        (np.array([True]), "type bool"),
        (np.zeros(2, np.complex64), "type complex64"),
        (np.zeros(2, np.longdouble), "type float128"),
        (np.array(["a"]), "type <U1"),
        (np.zeros(2, [("x", "<f4")]), "expected float16"),
        (np.array([{}, []], object), "Python objects, which are pickles and never loaded"),
    ],
)
def test_other_values_than_floats_are_refused_with_their_type(how, array, message, tmp_path):
    with pytest.raises(NpyError, match=message):
        read(how, npy(array), tmp_path)


@pytest.mark.parametrize("how", ["bytes", "file"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}", "header that is not valid"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2.0, 2)}", "header that is not valid"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': 4}", "header that is not valid"),
        ("{'descr': '<f4', 'fortran_order': 'no', 'shape': (4,)}", "header that is not valid"),
        ("{'descr': '<f4', 'shape': (4,)}", "header that is not valid"),
        ("{'descr': '<zz', 'fortran_order': False, 'shape': (4,)}", "type <zz"),
        ("{'descr': [1], 'fortran_order': False, 'shape': (4,)}", r"type \[1\]"),
        ("no header", "header that is not valid"),
        ("[" * 5000, "header that is not valid"),
        ("", "header that is not valid"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 9)}", "is cut off: .* its header says"),
        (f"{{'descr': '<f4', 'fortran_order': False, 'shape': (0, {10**30})}}", "impossible shape"),
        (f"{{'descr': '<f4', 'fortran_order': False, 'shape': {(1,) * 40}}}", "header that is not valid"),
    ],
)
def test_a_header_that_is_nonsense_is_refused_and_costs_no_memory(how, text, message, tmp_path):
    tracemalloc.start()
    with pytest.raises(NpyError, match=message):
        read(how, with_header(text), tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000


@pytest.mark.parametrize("how", ["bytes", "file"])
def test_a_file_that_is_cut_off_says_what_it_has_and_should_have(how, tmp_path):
    data = npy(np.zeros((2, 3), np.float32))
    with pytest.raises(NpyError, match=f"is cut off: {len(data) - 5} bytes, its header says {len(data)} "):
        read(how, data[:-5], tmp_path)
    with pytest.raises(NpyError, match="has bytes behind its values"):
        read(how, data + b"\0", tmp_path)


def test_a_git_lfs_pointer_in_a_tar_is_named_with_its_member():
    with pytest.raises(NpyError, match="t.tar, member a.npy is a Git LFS pointer.*git lfs pull"):
        parse_npy(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", name="t.tar, member a.npy")


@given(data=st.binary(max_size=80), cut=st.integers(0, 200), at=st.integers(0, 150))
def test_damaged_bytes_are_an_array_or_an_error_of_ours(data, cut, at):
    whole = npy(np.zeros((2, 3), np.float32))
    for damaged in (data, whole[:cut], whole[:at] + data + whole[at + len(data) :]):
        try:
            parse_npy(damaged, name="a")
        except NpyError as error:
            assert str(error).startswith("a ")
