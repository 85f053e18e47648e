"""A picture is read by a few decoders, within bounds, or refused by name, whatever is wrong with it."""

from __future__ import annotations

import io
import os
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from data_shards import picture_features as features
from data_shards.picture_features import features_of_pictures
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import (
    FORMATS,
    MAX_PIXELS,
    MAX_SIDE,
    PictureError,
    open_picture,
)
from mmcot.texts.sample import Sample

ROOT = Path(__file__).parents[2]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def encoded(kind="PNG", image=None, **options):
    stream = io.BytesIO()
    (image or Image.new("RGB", (8, 4), "red")).save(stream, kind, **options)
    return stream.getvalue()


def opened(data, **options):
    return open_picture(data, name="question a1: picture a.png", **options)


# Which decoders run


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program of its name that leaves a mark when it is started."""
    folder, mark = tmp_path / "bin", tmp_path / "was-started"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {mark}\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # what it found before
    with pytest.raises(OSError):
        Image.open(io.BytesIO(EPS)).load()
    assert mark.exists()  # Pillow itself does start it
    mark.unlink()
    return mark


def test_a_postscript_file_called_a_picture_starts_no_ghostscript(tmp_path, ghostscript):
    (tmp_path / "a.png").write_bytes(EPS)
    for picture in (EPS, tmp_path / "a.png"):
        with pytest.raises(
            PictureError,
            match=r"a.png is no picture of a known format \(PNG, JPEG, .*\); convert, replace or remove it",
        ):
            opened(picture)
    assert not ghostscript.exists()


def test_no_column_of_a_saved_data_set_is_decoded_by_who_reads_it(tmp_path, ghostscript):
    import datasets

    picture = {"bytes": EPS, "path": None}
    row = {
        "qid": "a1",
        "question": "Which?",
        "choices": ["sun", "moon"],
        "answer": 0,
        "image": picture,
        "thumbnail": picture,
        "more": [picture],
    }
    kinds = {"image": datasets.Image(), "thumbnail": datasets.Image(), "more": datasets.List(datasets.Image())}
    kinds |= {
        "qid": datasets.Value("string"),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
    }
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row], features=datasets.Features(kinds))}).save_to_disk(
        tmp_path / "hf"
    )
    questions = read_questions(tmp_path / "hf")
    assert questions.pictures(questions.problems["train"][0]) == [EPS]
    assert not ghostscript.exists()


def test_a_row_of_a_saved_data_set_may_bring_several_pictures(tmp_path):
    import datasets

    held = [{"bytes": encoded(), "path": "x/0.png"}, {"bytes": encoded("JPEG"), "path": "x/1.jpg"}]
    rows = [
        {"qid": f"q{n}", "question": "Which?", "choices": ["sun", "moon"], "answer": 0, "image": held[:n]}
        for n in range(3)
    ]
    kinds = {"image": datasets.List(datasets.Image())}
    kinds |= {
        "qid": datasets.Value("string"),
        "question": datasets.Value("string"),
        "choices": datasets.List(datasets.Value("string")),
        "answer": datasets.Value("int64"),
    }
    datasets.Dataset.from_list(rows, features=datasets.Features(kinds)).save_to_disk(tmp_path / "hf")
    questions = read_questions(tmp_path / "hf")
    found = [questions.pictures(problem) for problem in questions.problems["train"]]
    assert found == [[], [held[0]["bytes"]], [held[0]["bytes"], held[1]["bytes"]]]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "MPO"])
def test_pictures_of_the_formats_that_are_told_are_read(kind):
    assert np.allclose(np.asarray(opened(encoded(kind))), (255, 0, 0), atol=6)


def test_two_pictures_in_one_file_of_a_phone_give_the_first():
    data = encoded("MPO", save_all=True, append_images=[Image.new("RGB", (8, 4), "blue")])
    assert Image.open(io.BytesIO(data)).format == "MPO" and opened(data).getpixel((0, 0))[0] > 240


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI", "JPEG2000", "DDS", "AVIF", "IM", "SPIDER"])
def test_other_formats_of_pillow_are_refused(kind):
    image = Image.new("F", (8, 4)) if kind == "SPIDER" else None
    with pytest.raises(PictureError, match="is no picture of a known format"):
        opened(encoded(kind, image))


def test_the_formats_are_those_of_the_documentation():
    text = " ".join((ROOT / "docs" / "security.md").read_text().split())
    told = re.search(r"pictures are read as ([A-Z, ]+) or ([A-Z]+)", text)
    assert (*told[1].split(", "), told[2]) == FORMATS
    assert f"sides above {MAX_SIDE:,} or with more than {MAX_PIXELS // 10**6} million pixels" in text


# How large


def png_of(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def gif_of(width, height, *, frame=(1, 1)):
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return head + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00;"


def webp_of(width, height):
    facts = bytes([0x10, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + facts + encoded("WEBP", lossless=True)[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_of(width, height):
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 4, 1, height),
        (279, 4, 1, 1),
    ]
    return (
        b"II*\0"
        + struct.pack("<II", 12, 0)
        + struct.pack("<H", len(tags))
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + bytes(4)
    )


def bmp_of(width, height):
    return (
        b"BM"
        + struct.pack("<IHHI", 58, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 1, 0, 0, 0, 0, 2, 2)
        + b"\0\0\0\0\xff\xff\xff\0"
    )


def jpeg_of(width, height):
    data = bytearray(encoded("JPEG"))
    at = data.find(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS = {
    "png-column": png_of(1, 99_999_999),
    "png-row": png_of(99_999_999, 1),
    "png-square": png_of(2**31 - 1, 2**31 - 1),
    "png-area": png_of(16_000, 16_000),
    "gif": gif_of(65_535, 65_535),
    "gif-frame": gif_of(1, 1, frame=(65_535, 1)),
    "webp": webp_of(16_383, 16_383),
    "webp-row": webp_of(2**24, 10),
    "tiff": tiff_of(99_999_999, 1),
    "tiff-square": tiff_of(2**31, 2**31),
    "bmp": bmp_of(99_999_999, 1),
    "jpeg": jpeg_of(65_535, 65_535),
    "jpeg-row": jpeg_of(65_535, 1),
}


def test_headers_of_huge_pictures_are_refused_without_the_memory_they_ask_for(tmp_path):
    """In a process of their own, whose greatest size is looked at; the first of them took 760 MB to 2.8 GB."""
    for name, data in BOMBS.items():
        (tmp_path / name).write_bytes(data)
    code = """
import resource, sys
from pathlib import Path
from data_shards.sources.pictures import PictureError, open_picture
for path in sorted(Path(sys.argv[1]).iterdir()):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        print(path.name, "was read", open_picture(path, name=path.name).size)
    except PictureError as error:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(path.name, "was refused" if grown < 50 else f"took {grown} MB")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.splitlines() == [f"{name} was refused" for name in sorted(BOMBS)], done.stderr


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("png-column", "1 x 99999999"),
        ("tiff", "99999999 x 1"),
        ("bmp", "99999999 x 1"),
        ("jpeg-row", "65535 x 1"),
        ("gif-frame", "65535 x 1"),
    ],
)
def test_a_picture_that_is_too_large_is_told_its_size_and_what_is_read(name, size):
    with pytest.raises(
        PictureError,
        match=rf"a.png has {size} pixels; sides up to 16,384 and 100,000,000 pixels in all are read: make it smaller",
    ):
        opened(BOMBS[name])


def test_the_longest_side_is_read():
    assert opened(encoded(image=Image.new("1", (1, MAX_SIDE)))).size == (1, MAX_SIDE)
    with pytest.raises(PictureError, match="make it smaller"):
        opened(encoded(image=Image.new("1", (MAX_SIDE + 1, 1))))


def test_a_file_of_gigabytes_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PictureError, match="has 1,099,511,627,776 bytes; at most 1,000,000,000 are read"):
        opened(tmp_path / "a.png")


def test_where_small_is_enough_a_jpeg_is_decoded_small():
    data = encoded("JPEG", Image.effect_noise((800, 1600), 50))
    assert opened(data, longest_side=200).size == (200, 400) and opened(data).size == (800, 1600)
    assert opened(encoded(image=Image.new("L", (800, 1600))), longest_side=200).size == (800, 1600)


def test_large_pictures_are_encoded_in_smaller_batches(monkeypatch):
    monkeypatch.setattr(features, "MAX_PIXELS", 100)
    batches = []

    def encode(images):
        batches.append(len(images))
        return np.zeros((len(images), 1, 1), dtype=np.float16)

    problems = [Sample(qid=f"q{number}", question="Which?", choices=("a", "b")) for number in range(8)]
    sizes = {
        "q0": (2, 2),
        "q1": (2, 2),
        "q2": (10, 10),
        "q3": (50, 50),
        "q4": (7, 7),
        "q5": (7, 8),
        "q6": (1, 1),
        "q7": (1, 1),
    }
    arrays = features_of_pictures(
        problems,
        Counter(),
        open_pictures=lambda problem, counts: [Image.new("RGB", sizes[problem.qid])],
        encode=encode,
        shape=(1, 1),
        batch_size=4,
    )
    assert len(list(arrays)) == 8 and batches == [3, 1, 2, 2]


# What is wrong with it


@pytest.mark.parametrize(
    "kind",
    [
        struct.error,
        TypeError,
        IndexError,
        OverflowError,
        MemoryError,
        EOFError,
        KeyError,
        zlib.error,
        RecursionError,
        SyntaxError,
        AttributeError,
        ZeroDivisionError,
    ],
)
@pytest.mark.parametrize("where", ["PIL.Image.open", "PIL.PngImagePlugin.PngImageFile.load"])
def test_whatever_a_decoder_raises_the_picture_is_named(monkeypatch, kind, where):
    def fail(*args, **options):
        raise kind("oops")

    data = encoded()
    monkeypatch.setattr(where, fail)
    with pytest.raises(
        PictureError,
        match=rf"question a1: picture a.png is damaged or cut off \({kind.__name__}: .*oops.*\); replace or remove it",
    ):
        opened(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_altered_bytes_of_a_picture_end_in_a_picture_or_its_error(kind):
    image = Image.effect_noise((40, 24), 80).convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data, draw = encoded(kind, image, **({"exif": exif} if kind not in ("GIF", "BMP") else {})), random.Random(0)
    outcomes = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(300):
            mutant = bytearray(data[: draw.choice((len(data), len(data), draw.randrange(1, len(data))))])
            for _ in range(draw.choice((1, 4, 20))):
                mutant[
                    draw.randrange(len(mutant)) if draw.random() < 0.5 else draw.randrange(min(len(mutant), 120))
                ] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
            try:
                outcomes[opened(bytes(mutant)).mode] += 1
            except PictureError:
                outcomes["refused"] += 1
    assert set(outcomes) <= {"RGB", "refused"} and outcomes["refused"]


def with_exif(tags, kind="JPEG"):
    """A picture of 40 x 24 whose EXIF block has these (tag, type, count, value) as they are."""
    block = (
        b"MM\0*\0\0\0\x08"
        + struct.pack(">H", len(tags))
        + b"".join(struct.pack(">HHI", *tag[:3]) + tag[3] for tag in tags)
        + bytes(4)
        + b"\0\0\0\1\0\0\0\0" * 4
    )
    return encoded(kind, Image.new("RGB", (40, 24), "red"), exif=b"Exif\0\0" + block)


def test_a_header_that_is_altered_is_told_from_a_file_that_is_no_picture():
    data = bytearray(encoded())
    data[18] ^= 1
    with pytest.raises(PictureError, match="is damaged or cut off"):
        opened(bytes(data))


TURNED = (0x0112, 3, 1, b"\0\6\0\0")
UNIT, RESOLUTION = (0x0128, 3, 1, b"\0\2\0\0"), 0x011A


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "tags",
    [
        [TURNED],
        [TURNED, (RESOLUTION, 2, 4, b"high"), UNIT],
        [TURNED, (RESOLUTION, 5, 1, b"\xff\xff\xff\xff"), UNIT],
        [TURNED, (RESOLUTION, 5, 0, bytes(4)), UNIT],
        [TURNED, (RESOLUTION, 1, 1, bytes(4)), UNIT],
        [TURNED, (0x0100, 11, 1, b"\x7f\xc0\0\0")],
        [TURNED, (0x8769, 4, 1, b"\0\0\0\x08")],
        [TURNED, (0x8825, 4, 1, b"\xff\xff\xff\xff")],
        [TURNED, (0x8769, 2, 4, b"here")],
        [TURNED, (RESOLUTION, 10, 1, b"\0\0\0\x14"), UNIT],
        [TURNED, (0x010F, 2, 4_000_000_000, b"\0\0\0\x08")],
    ],
)
def test_a_picture_is_turned_though_the_rest_of_its_exif_block_is_nonsense(tags, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opened(with_exif(tags, kind)).size == (24, 40)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "tag",
    [
        (0x0112, 2, 4, b"left"),
        (0x0112, 5, 1, b"\xff\xff\xff\xff"),
        (0x0112, 3, 1, b"\0\x63\0\0"),
        (0x0112, 3, 0, bytes(4)),
        (0x0112, 99, 1, bytes(4)),
    ],
)
def test_an_orientation_that_cannot_be_read_turns_nothing(tag, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opened(with_exif([tag], kind)).size == (40, 24)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0MM", b"Exif\0\0not a TIFF header", b"Exif\0\0II*\0\xff\xff\xff\xff"]
)
def test_an_exif_block_that_is_none_leaves_the_picture(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert opened(encoded("JPEG", Image.new("RGB", (40, 24)), exif=block)).size == (40, 24)


def test_all_eight_orientations_are_turned_as_pillow_turns_them():
    from PIL import ImageOps

    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3))
    for kind in ("PNG", "TIFF"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            data = encoded(kind, image, exif=exif)
            expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(np.asarray(opened(data)), np.asarray(expected))


# Levels


RAMP = np.linspace(0, 1, 256).reshape(16, 16)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("PNG", (RAMP * 65_535).round().astype(np.uint16)),
        ("TIFF", (RAMP * 65_535).round().astype(np.uint16)),
        ("TIFF", (RAMP * 65_535).round().astype(np.int32)),
        ("TIFF", (RAMP * 255).round().astype(np.int32)),
        ("TIFF", RAMP.astype(np.float32)),
        ("TIFF", (RAMP * 255).astype(np.float32)),
        ("TIFF", (RAMP * 65_535).astype(np.float32)),
        ("TIFF", (RAMP * 2 - 1).astype(np.float32)),
        ("TIFF", (RAMP * 4_000_000).astype(np.int32)),
    ],
)
def test_grey_of_more_than_eight_bits_keeps_its_levels(kind, values):
    read = np.asarray(opened(encoded(kind, Image.fromarray(values))))
    np.testing.assert_allclose(read[:, :, 0], RAMP * 255, atol=1)
    assert (read[:, :, 0] == read[:, :, 2]).all()


def test_a_dark_picture_of_sixteen_bits_stays_dark():
    assert np.asarray(opened(encoded(image=Image.fromarray(np.full((4, 4), 2570, dtype=np.uint16))))).max() == 10


def test_the_transparent_grey_of_sixteen_bits_becomes_white():
    values = np.array([[0, 30_000], [30_001, 65_535]], dtype=np.uint16)
    read = np.asarray(opened(encoded(image=Image.fromarray(values), transparency=30_000)))
    assert read[:, :, 0].tolist() == [[0, 255], [117, 255]]


def test_floats_that_are_no_numbers_are_refused():
    with pytest.raises(PictureError, match="NaN or infinite"):
        opened(encoded("TIFF", Image.fromarray(np.array([[0, np.nan]], dtype=np.float32))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_over_the_whole_height(mode):
    image = Image.new("RGBA", (2, 2500), (0, 0, 255, 0))
    image.putpixel((1, 2499), (0, 0, 255, 255))
    read = opened(encoded(image=image.convert(mode)))
    assert read.getpixel((0, 0)) == read.getpixel((0, 2499)) == (255, 255, 255) and read.getpixel((1, 2499)) == {
        "LA": (29, 29, 29)
    }.get(mode, (0, 0, 255))
