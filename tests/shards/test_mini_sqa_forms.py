"""MiniSQA in its other forms: free answers, image-text pairs, episodes; skills and captions by choice."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from data_shards.atomic_files import fingerprint
from data_shards.mini_sqa.episodes import COLOURS, NEW_COLOURS, WORDS
from data_shards.mini_sqa.generate import FORMS, VERSION, content_sha256, write_mini_sqa
from data_shards.mini_sqa.skills import SKILLS, accepted_answers
from data_shards.reader import SplitReader
from data_shards.sources.forms import read_questions
from data_shards.sources.pictures import open_picture
from launcher.config.loading import load_settings, parse_settings
from launcher.config.settings import MiniSQA, SettingsError
from launcher.data.build import prepare_data
from launcher.data.dataset import mini_sqa_folder
from mmcot.texts.prompts import build_pair
from mmcot.texts.sample import Sample

SIZES = {"num_train": 64, "num_val": 16, "num_test": 16}
KIND_OF_FORM = {"choices": "choices", "free": "free", "captions": "pair", "episodes": "document"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small draw of every form."""
    root = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        write_mini_sqa(root / form, **SIZES, form=form)
    return root


def read(folder, name="problems.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_as_samples_of_its_kind_with_all_their_pictures(folders, form):
    questions = read_questions(folders / form)
    everything = [sample for samples in questions.problems.values() for sample in samples]
    assert [len(samples) for samples in questions.problems.values()] == list(SIZES.values())
    assert {sample.kind for sample in everything} == {KIND_OF_FORM[form]}
    pictures = [path for sample in everything for path in questions.pictures(sample)]
    assert len(pictures) >= 40 and all(path.is_file() for path in pictures)
    for qid, record in read(folders / form).items():
        assert Sample.from_record({**record, "qid": qid}).kind == KIND_OF_FORM[form]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_arguments_write_equal_bytes_in_every_form_and_another_seed_does_not(folders, form, tmp_path):
    for name, seed in (("again", 0), ("other", 1)):
        write_mini_sqa(tmp_path / name, **SIZES, form=form, seed=seed)
    assert content_sha256(tmp_path / "again") == content_sha256(folders / form) != content_sha256(tmp_path / "other")


def test_free_answers_are_those_of_the_same_questions_with_choices(folders):
    with_choices, free = read(folders / "choices"), read(folders / "free")
    for qid, record in free.items():
        question = with_choices[qid]
        assert record["answers"][0] == question["choices"][question["answer"]]
        left_out = ("choices", "answer", "answers", "task")
        assert {name: record[name] for name in record if name not in left_out} == {
            name: question[name] for name in question if name not in left_out
        }
    assert read(folders / "free", "ceilings.json") == read(folders / "choices", "ceilings.json")
    assert read(folders / "free", "captions.json") == read(folders / "choices", "captions.json")


def test_accepted_answers_are_the_choice_and_the_same_in_fewer_words():
    accepted = {skill.choices[index]: accepted_answers(skill, index) for skill in SKILLS for index in range(2)}
    assert accepted["the left jar"] == ["the left jar", "left jar", "left"]
    assert accepted["the owl"] == ["the owl", "owl"] and accepted["attract"] == ["attract"]
    for skill in SKILLS:
        answers = [set(accepted_answers(skill, index)) for index in range(len(skill.choices))]
        assert all(not one & other for number, one in enumerate(answers) for other in answers[:number])


def test_no_prompt_of_a_free_question_tells_its_answer_alone(folders):
    for split in read_questions(folders / "free").problems.values():
        for sample in split:
            prompt = set(build_pair(sample, "QCM-A")[0].lower().replace("?", "").split())
            skill = next(skill for skill in SKILLS if skill.skill == sample.skill)
            named = [choice for choice in skill.choices if choice in prompt]
            assert named in ([], list(skill.choices)), sample  # "attract or repel", or none of them


def test_captions_are_pairs_of_the_pictures_alone_and_tell_one_fact_in_ten(folders, tmp_path):
    pairs = [sample for samples in read_questions(folders / "captions").problems.values() for sample in samples]
    scenes = {scene for skill in SKILLS for scene in skill.scenes}
    assert {sample.skill for sample in pairs} == {skill.skill for skill in SKILLS if skill.paint}
    assert not any(sample.question or sample.caption or sample.hint or sample.solution for sample in pairs)
    assert 0 < sum(sample.text not in scenes for sample in pairs) < 0.2 * len(pairs)
    write_mini_sqa(tmp_path, **SIZES, form="captions", telling_captions=True)
    telling = [sample for samples in read_questions(tmp_path).problems.values() for sample in samples]
    assert not any(sample.text in scenes for sample in telling)
    assert not (tmp_path / "ceilings.json").exists() and not (folders / "captions" / "ceilings.json").exists()


def test_telling_captions_leave_questions_and_pictures_as_they_are(folders, tmp_path):
    write_mini_sqa(tmp_path, **SIZES, telling_captions=True)
    assert read(tmp_path) == read(folders / "choices")
    for picture in (folders / "choices" / "images").rglob("*.png"):
        assert (tmp_path / picture.relative_to(folders / "choices")).read_bytes() == picture.read_bytes()
    before, after = (read(folder, "captions.json")["captions"] for folder in (folders / "choices", tmp_path))
    assert before.keys() == after.keys() and sum(before[qid] == after[qid] for qid in before) < 0.2 * len(before)
    assert not (tmp_path / "ceilings.json").exists()


@pytest.mark.parametrize("form", ["choices", "free", "captions"])
def test_only_the_named_skills_are_drawn_in_equal_shares(tmp_path, form):
    write_mini_sqa(tmp_path, **SIZES, form=form, skills=["map", "magnets"])
    counts = Counter(record["category"] for record in read(tmp_path).values())
    assert counts == {"Magnets": 48, "Maps": 48}
    if form != "captions":
        assert len(read(tmp_path, "ceilings.json")["per_skill"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skills": ["magnet"]}, "no skill named 'magnet'; expected some of magnets, solutions, map, trait, food-web"),
        ({"skills": ["tense"], "form": "captions"}, "no skill with a picture named 'tense'"),
        ({"skills": ["map"], "form": "episodes"}, "have neither skills nor captions"),
        ({"telling_captions": True, "form": "episodes"}, "have neither skills nor captions"),
    ],
)
def test_what_does_not_go_together_is_refused_by_the_generator_and_by_the_settings(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_mini_sqa(tmp_path, **SIZES, **arguments)
    with pytest.raises(SettingsError, match=message):
        parse_settings(
            {
                "data": {"mini_sqa": arguments, "max_pictures": 9},
                "rationale": {"num_steps": 1},
                "answer": {"num_steps": 1},
            }
        )


def test_an_unknown_form_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one of choices, free, captions, episodes"):
        write_mini_sqa(tmp_path, **SIZES, form="poems")


def test_the_settings_offer_the_forms_of_the_generator():
    assert tuple(MiniSQA.model_fields["form"].annotation.__args__) == FORMS


def colour_of(path):
    """The name of the colour that a picture shows, by the tile with the strongest colour."""
    palette = COLOURS | NEW_COLOURS
    image = open_picture(path, name=path.name)
    tiles = [image.getpixel((8 * column, 8 * row)) for row in range(8) for column in range(8)]
    marked = [tile for tile in tiles if max(tile) - min(tile) > 40 or max(tile) < 80]
    assert 3 <= len(marked) <= 5
    return min(palette, key=lambda name: sum(abs(a - b) for a, b in zip(palette[name], marked[0], strict=True)))


@pytest.fixture(scope="module")
def episodes(folders):
    questions, lists = read_questions(folders / "episodes"), read(folders / "episodes", "pid_splits.json")
    everything = {sample.qid: sample for samples in questions.problems.values() for sample in samples}
    colours = {qid: [colour_of(path) for path in questions.pictures(sample)] for qid, sample in everything.items()}
    words = {qid: [part.text for part in sample.document if part.text] for qid, sample in everything.items()}
    return lists, everything, colours, words


def test_an_episode_shows_two_colours_with_two_new_words_and_asks_for_one_of_them(episodes):
    lists, everything, colours, words = episodes
    for qid in set(everything) - set(lists["naming"]):
        assert [bool(part.image) for part in everything[qid].document] == [True, False] * len(words[qid])
        assert 3 <= len(words[qid]) <= 9
        meaning = dict(zip(colours[qid], words[qid], strict=True))
        assert len(meaning) == 2 == len(set(meaning.values())) and set(meaning.values()) <= set(WORDS)
        assert all(meaning[c] == w for c, w in zip(colours[qid], words[qid], strict=True))
        assert set(words[qid][:-1]) == set(meaning.values())  # both are shown before the last picture
    assert {len(words[qid]) - 1 for qid in lists["episodes"]} == set(range(2, 9))


def test_lists_name_the_parts_of_episodes_and_new_colours_are_in_test_episodes_alone(episodes):
    lists, everything, colours, words = episodes
    assert len(lists["naming"]) == 8 and sorted(lists["naming"] + lists["episodes"]) == sorted(lists["train"])
    assert all(words[qid] == colours[qid] for qid in lists["naming"])
    new, known = lists["new-colours"], lists["known-colours"]
    assert len(new) == 8 and sorted(new + known) == sorted(lists["test"])
    for qid in everything:
        assert set(colours[qid]) <= set(NEW_COLOURS if qid in new else COLOURS)


def test_the_text_of_episodes_says_nothing_of_their_last_word(tmp_path):
    write_mini_sqa(tmp_path, num_train=1200, num_val=1, num_test=1, form="episodes", max_shots=4)
    samples = read_questions(tmp_path).problems["train"]
    words = [[part.text for part in sample.document if part.text] for sample in samples]
    words = [each for each in words if len(each) > 1]
    for guess in (lambda shown: shown[0], lambda shown: shown[-1], lambda shown: Counter(shown).most_common(1)[0][0]):
        right = sum(guess(each[:-1]) == each[-1] for each in words) / len(words)
        assert abs(right - 0.5) < 0.06, right
    assert max(map(len, words)) == 5


def test_episodes_need_as_many_pictures_as_a_sample_may_have_and_become_shards(tmp_path):
    small = ["data.mini_sqa.num_train=8", "data.mini_sqa.num_val=2", "data.mini_sqa.num_test=2"]
    small += ["data.mini_sqa.form=episodes", f"data.shards_dir={tmp_path / 'out'}"]
    with pytest.raises(SettingsError, match=r"data.max_pictures \(1\) must be at least 3 for episodes"):
        load_settings(preset="demo", overrides=small)
    settings = load_settings(preset="demo", overrides=[*small, "data.max_pictures=3"])
    reader = SplitReader(prepare_data(settings, lambda line: None).path, "val", features="patch")
    assert reader.problem(0).kind == "document" and reader.features(0).shape == (3 * 64, 208)
    assert settings.data.mini_sqa_arguments["max_shots"] == 2


@pytest.mark.parametrize("values", [{}, {"num_train": 64}, {"num_train": 64, "num_val": 8, "seed": 3}])
def test_settings_without_a_form_keep_the_folder_of_earlier_versions(values):
    data = load_settings(preset="demo").data.model_copy(update={"mini_sqa": MiniSQA(**values)})
    before = {"num_train": 4000, "num_val": 400, "num_test": 800, "seed": 0, "shuffle_choices": True}
    before |= {"extra_choices": 1, **values}
    assert data.mini_sqa_arguments == before
    assert mini_sqa_folder(data).name == f"mini_sqa-source-{fingerprint({**before, 'version': VERSION})}"


def test_skills_may_be_set_on_the_command_line():
    overrides = ["data.mini_sqa.skills=[magnets, map]", "data.mini_sqa.form=free"]
    data = load_settings(preset="demo", overrides=overrides).data
    assert data.mini_sqa.skills == ["magnets", "map"]
    assert data.mini_sqa_arguments["form"] == "free" and "telling_captions" not in data.mini_sqa_arguments
