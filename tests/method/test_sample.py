"""The kinds of samples: records, prompts, targets and the reading of answers."""

from __future__ import annotations

import random

import pytest

from mmcot.texts.answers import is_right, parse_prediction
from mmcot.texts.prompts import INPUTS, OUTPUTS, build_pair
from mmcot.texts.sample import Part, Sample, SampleError

CHOICES = Sample("c", "Hot?", ("yes", "no"), 1, solution="Ice is cold.")
FREE = Sample("f", "How many?", answers=("2", "two"), solution="Count them.", images=("a.png",))
PAIR = Sample("p", text="Two red magnets.", images=("a.png", "b.png"))
DOCUMENT = Sample.of_document(
    "d", [Part(image="a.png"), Part("What is it?", role="user"), Part(image="b.png"), Part("A map.", role="assistant")]
)
ALL = [CHOICES, FREE, PAIR, DOCUMENT]


@pytest.mark.parametrize("sample", ALL, ids=lambda sample: sample.kind)
def test_a_record_of_each_kind_is_read_back_equal(sample):
    assert Sample.from_record(sample.to_record()) == sample
    assert [name for name in ("choices", "answers", "text", "document") if sample.to_record().get(name)] == [
        {"choices": "choices", "free": "answers", "pair": "text", "document": "document"}[sample.kind]
    ]


def test_random_records_are_read_back_equal():
    draw = random.Random(0)

    def text():
        return "".join(draw.choice("ab é\n<'\"\u2028") for _ in range(draw.randint(0, 5))) + "x"

    for number in range(300):
        images = tuple(f"{draw.randint(0, 9)}.png" for _ in range(draw.randint(1, 3)))
        parts = [
            Part(image=images[0]),
            *(Part(text(), role=draw.choice(["", "user"])) for _ in range(draw.randint(1, 4))),
        ]
        fields = {"hint": text(), "caption": text(), "split": "train"}
        sample = draw.choice(
            [
                Sample(str(number), text(), tuple(text() for _ in range(3)), draw.choice([None, 0, 2]), **fields),
                Sample(str(number), text(), answers=tuple(text() for _ in range(draw.randint(0, 3))), **fields),
                Sample(str(number), draw.choice(["", text()]), text=text(), images=images, **fields),
                Sample.of_document(str(number), parts, **fields),
            ]
        )
        assert Sample.from_record(sample.to_record()) == sample


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "Hot?", "choices": ("a", "b"), "answers": ("a",)}, "'choices' and 'answers'"),
        ({"text": "A map."}, "needs 'image'"),
        ({"question": "Hot?", "answers": (" ",)}, "accepted answer is empty"),
        ({"question": " ", "answers": ("a",)}, "'question' is empty"),
        ({"question": "Hot?"}, "the number of choices is 0; expected 2 to 26"),
        ({"document": (Part("a"), Part(image="b.png")), "images": ("b.png",)}, "ends with a picture"),
        ({"document": (Part(),)}, "part 1 of its document"),
        ({"document": (Part("a", image="b.png"),), "images": ("b.png",)}, "part 1 of its document"),
        ({"document": (Part("a"),), "images": ("b.png",)}, "not those of its document"),
        ({"document": (Part("a"),), "question": "b"}, "has no question"),
    ],
)
def test_a_sample_of_no_kind_is_refused_with_its_id(fields, message):
    with pytest.raises(SampleError, match=r"(question|sample) x") as error:
        Sample("x", **fields)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "document", [[], "a", ["a"], [{"image": 3}], [{"txt": "a"}], [{"image": "../a.png"}, {"text": "b"}]]
)
def test_a_document_of_another_form_is_refused(document):
    with pytest.raises(SampleError, match="x"):
        Sample.from_record({"qid": "x", "document": document})


def test_each_kind_has_its_prompt_and_target():
    assert build_pair(FREE, "QCM-A") == ("Question: How many? Context: N/A Answer:", "The answer is 2.")
    assert build_pair(FREE, "QCMG-LEA", rationale="Two.")[1] == "Count them. The answer is 2."
    assert build_pair(PAIR, "P-T") == ("", "Two red magnets.")
    assert build_pair(DOCUMENT, "P-T") == ("<image> User: What is it? <image>", "A map.")
    assert build_pair(CHOICES, "P-T") == ("Question: Hot? Context: N/A Options: (A) yes (B) no", "no")
    assert build_pair(Sample("f", "How many?", answers=()), "QCM-A") == ("Question: How many? Context: N/A Answer:", "")


def test_each_kind_is_built_in_each_format_or_refused_with_the_format_that_fits():
    for sample in ALL:
        for name in (f"{first}-{last}" for first in INPUTS for last in OUTPUTS):
            if sample.kind in ("pair", "document") and name != "P-T":
                with pytest.raises(ValueError, match=f"sample {sample.qid}.*use the format P-T"):
                    build_pair(sample, name)
            else:
                source, target = build_pair(sample, name)
                assert isinstance(source, str) and (target or (name.endswith("-C") and not sample.caption))


@pytest.mark.parametrize(
    ("sample", "text", "output", "prediction", "right"),
    [
        (CHOICES, "The answer is (B).", "A", 1, True),
        (CHOICES, " No", "T", 1, True),
        (CHOICES, "maybe", "T", None, False),
        (FREE, "The answer is two.", "A", "two", True),
        (FREE, "They are. The answer is 3.5 m. BECAUSE: so", "A", "3.5 m", False),
        (FREE, "two", "A", None, False),
        (FREE, "The answer is 2. The answer is 2.", "A", None, False),
        (FREE, "The answer is .", "A", None, False),
        (FREE, "The Two!", "T", "The Two!", True),
        (PAIR, "two red magnets", "T", "two red magnets", True),
        (DOCUMENT, "", "T", None, False),
    ],
)
def test_an_answer_is_read_and_judged(sample, text, output, prediction, right):
    assert parse_prediction(sample, text, output=output) == prediction
    assert is_right(sample, prediction) is right


def test_a_text_of_articles_or_marks_alone_is_not_equal_to_every_other():
    assert not is_right(Sample("f", "Which letter?", answers=("A",)), "the")
    assert not is_right(Sample("f", "Which mark?", answers=("?",)), "!")
    assert is_right(Sample("f", "Which letter?", answers=("A",)), "a.")


def test_the_target_of_a_random_sample_is_read_as_its_right_answer():
    draw = random.Random(0)
    for number in range(300):
        text = " ".join(draw.choices(["a", "map", "3.5", "U.S.", "no.", "(B)", "\u4e8c", "?"], k=draw.randrange(1, 5)))
        samples = [
            (Sample(str(number), "What?", answers=(text, "x"), solution="So it is."), ("QCM-A", "QCM-ALE", "P-T")),
            (Sample(str(number), text=text, images=("a.png",)), ("P-T",)),
            (Sample.of_document(str(number), [Part("What?", role="user"), Part(text)]), ("P-T",)),
            (Sample(str(number), "What?", ("x y", text), 1), ("QCM-A", "QCM-LEA", "P-T")),
        ]
        for sample, formats in samples:
            for name in formats:
                target = build_pair(sample, name)[1]
                assert is_right(sample, parse_prediction(sample, target, output=name.rpartition("-")[2])), target


@pytest.mark.parametrize(
    ("sample", "prompt"),
    [
        (Sample("f", "How many?", answers=()), "Question: How many? Context: N/A"),
        (Sample("p", "Describe it.", images=("a.png",), text=""), "Describe it."),
        (Sample.of_document("d", [Part(image="a.png"), Part("What?", role="user"), Part()]), "<image> User: What?"),
    ],
)
def test_a_sample_whose_text_is_unknown_has_a_prompt_no_target_and_its_kind_in_the_record(sample, prompt):
    assert not sample.has_answer and sample.accepted == ()
    assert build_pair(sample, "P-T") == (prompt, "")
    assert Sample.from_record(sample.to_record()) == sample


def test_only_the_last_part_of_a_document_may_be_unknown():
    with pytest.raises(SampleError, match="part 1 of its document"):
        Sample.of_document("d", [Part(), Part("A map.")])
