"""What a sample is in a stage: captions that epochs leave out, and the pictures of other questions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from data_shards.errors import ShardError
from launcher.config.loading import load_settings
from launcher.config.settings import SettingsError
from launcher.pipeline import training_job
from launcher.stages.hub import fetch_pretrained
from launcher.stages.samples import load_tokenizer, open_stage


def samples_of(settings, data, split="train"):
    tokenizer = load_tokenizer(settings, data.path)
    return open_stage(settings, "rationale", split, shards_dir=data.path, tokenizer=tokenizer, texts={})


def with_data(settings, **values):
    return settings.model_copy(update={"data": settings.data.model_copy(update={"permute_choices": False} | values)})


def test_a_caption_is_left_out_in_its_share_of_a_training_questions_epochs(tiny_settings, tiny_data):
    always = samples_of(with_data(tiny_settings, use_caption=True), tiny_data)
    sometimes = samples_of(with_data(tiny_settings, use_caption=True, caption_dropout=0.25), tiny_data)
    plain = samples_of(tiny_settings, tiny_data)
    number = next(n for n in range(len(plain)) if plain.encode(n) != always.encode(n))
    seen = [sometimes.encode(number, epoch) for epoch in range(200)]
    assert seen == [sometimes.encode(number, epoch) for epoch in range(200)]
    assert set(seen) == {plain.encode(number), always.encode(number)}
    assert 25 <= seen.count(plain.encode(number)) <= 75
    assert sometimes.encode(number) == always.encode(number)
    others = samples_of(with_data(tiny_settings, use_caption=True, caption_dropout=0.25), tiny_data, "val")
    assert others.caption_dropout[0] == 0.0


def test_dropped_captions_that_nothing_reads_are_refused():
    with pytest.raises(SettingsError, match=r"caption_dropout \(0.5\) leaves out captions that nothing reads"):
        load_settings(preset="demo", overrides=["data.caption_dropout=0.5"])


def test_features_of_another_question_are_of_as_many_pictures_and_not_its_own(tiny_settings, tiny_data):
    samples = samples_of(tiny_settings, tiny_data, "test")
    num_exchanged = 0
    for number in range(len(samples)):
        own = samples.reader.features(number)
        other = samples.features_of_another(number, own)
        assert own.shape == other.shape
        num_exchanged += len(own) > 0
        assert not len(own) or not np.array_equal(own, other)
    assert num_exchanged > 4


def test_features_without_a_place_in_the_text_are_refused(tiny_settings, tiny_data, monkeypatch):
    model = tiny_settings.model.model_copy(update={"inject": "embed", "resample": "pool", "media_tokens": 3})
    samples = samples_of(tiny_settings.model_copy(update={"model": model}), tiny_data, "test")
    number = next(n for n in range(len(samples)) if not samples.reader.problem(n).images)
    samples.load_block(np.arange(len(samples)))
    monkeypatch.setattr(samples.reader, "features", lambda sample: np.zeros(samples.reader.feature_shape))
    qid = samples.reader.qid(number)
    expected = f"test, sample {qid}: its text has 0 pictures, its features are of 1; a picture needs its place"
    with pytest.raises(ShardError, match=expected):
        samples.load_block(np.array([number]))


def test_other_pictures_without_features_are_refused():
    with pytest.raises(SettingsError, match=r"other_pictures exchanges pictures, and data\.features is null"):
        load_settings(preset="demo", overrides=["data.features=null", "generation.other_pictures=true"])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("runs/demo/answer/model", "the stage answer of `mmcot run --preset demo` trains; train that first"),
        ("work/mine/answer/model", "the stage answer of the run work/mine trains; train that first"),
        ("./nowhere", "give the folder of a saved transformers model, or a Hugging Face id"),
    ],
)
def test_a_pretrained_folder_that_does_not_exist_is_named_with_what_makes_it(name, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError) as caught:
        fetch_pretrained(name)
    assert str(caught.value).startswith(f"model.pretrained {name} does not exist") and remedy in str(caught.value)


def test_token_lengths_are_kept_apart_by_the_places_of_pictures(tiny_settings, tiny_data, tmp_path, monkeypatch):
    keys = []
    monkeypatch.setattr(
        training_job, "cached_lengths", lambda key, samples, cache, depends: keys.append(depends) or 1 / 0
    )
    attempt = SimpleNamespace(settings=None, report=print, run_dir=SimpleNamespace(lengths=tmp_path))
    for media in (
        {},
        {"inject": "embed", "resample": "mean"},
        {"inject": "embed", "resample": "mean", "media_tokens": 3},
    ):
        model = tiny_settings.model.model_copy(update=media)
        attempt.settings = tiny_settings.model_copy(update={"model": model})
        with pytest.raises(ZeroDivisionError):
            training_job.plan_training(attempt, tiny_data, "rationale", {}, texts={})
    assert [each.get("pictures") for each in keys] == [None, [16, 1], [3, 1]]
