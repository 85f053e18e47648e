"""The run report in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from PIL import Image
from report_run import write_run

from data_shards.atomic_files import commit_json, sha256_of_file
from data_shards.sources.forms import read_questions
from data_shards.sources.question_set import SPLITS
from data_shards.writer import write_text_shards
from launcher.config.loading import dump_settings, load_settings
from launcher.data.build import prepare_data
from launcher.evaluation.predictions import read_problems, score
from launcher.report.collect import collect
from launcher.report.render import render, write_report
from launcher.runs.journal import Journal
from launcher.runs.run_dir import RunDir, RunError
from mmcot.models.fusion import GatedCrossAttention

HOSTILE = (
    "<script>alert(1)</script><!-- </script><img src=x onerror=alert(2)> \u202eright to left \U0001f600 \x00\x07 "
    "{{DATA}} \u2028 "
)
NUM_TEST = 16

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def run(workplace, tiny_settings, tiny_data, model_dir):
    """A finished run with two (equal) models."""
    return write_run(workplace / "runs" / "seeing", tiny_settings, tiny_data, model_dir=model_dir)


@pytest.fixture(scope="module")
def page_file(run):
    """Its report."""
    return write_report([run], run / "report.html", num_looked_at=3)


def rows_found(page):
    return int(page.run("document.querySelector('#count strong').textContent.replaceAll(',', '')"))


def test_a_folder_that_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(RunError, match="holds no run .no run.yaml.; give the folder of one"):
        write_report([run, tmp_path], tmp_path / "report.html")


def test_the_command_writes_beside_the_run_and_explains_what_is_none(run, tmp_path):
    from typer.testing import CliRunner

    from launcher.cli.main import app

    done = CliRunner().invoke(app, ["report", str(run), "--looking", "0", "--out", str(tmp_path / "a.html")])
    assert (
        done.exit_code == 0 and "MB; open it in a browser" in done.output and (tmp_path / "a.html").stat().st_size < 1e6
    )
    refused = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert refused.exit_code == 1 and "holds no run" in refused.output


def test_the_policy_allows_the_pages_own_script_and_nothing_else(page_file):
    html = page_file.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    script = re.search(r"<script>(.*)</script>", html, re.DOTALL)[1]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:;") and "http:" not in html.replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert (
        "innerHTML" not in script
        and "insertAdjacentHTML" not in script
        and "<" not in re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1]
    )


def test_the_page_shows_everything_without_an_error(browser, page_file):
    page = browser.open(page_file)
    assert page.problems == []
    assert page.text("h1") == "demo" and "MiniSQA" in page.text("#scores") and "not comparable" in page.text("#scores")
    scores = json.loads((page_file.parent / "scores.json").read_text())
    assert f"{scores['accuracy']['AVG']:.2f}" in page.text("#summary") and "ceiling, text alone" in page.text("#scores")
    assert page.count("#curves svg") == 8 and page.count("#groups .bar") > 3 and page.count("#time tbody tr") == 5
    assert (
        page.run("[...document.querySelectorAll('main h2')].length") == 8
        and page.count("table:not(:has(caption))") == 0
    )


def test_filters_and_search_change_what_is_found(browser, page_file):
    page = browser.open(page_file)
    assert rows_found(page) == NUM_TEST == page.count("#list li")
    page.choose("Answer", "wrong", "#examples")
    num_wrong = rows_found(page)
    assert 0 < num_wrong < NUM_TEST and page.count("#list li") == num_wrong == page.count("#list .bad")
    page.choose("Answer", "unread", "#examples")
    assert rows_found(page) == 1
    page.choose("Answer", "all", "#examples")
    page.choose("Class", "IMG", "#examples")
    num_with_picture = rows_found(page)
    page.run(
        "{ const s = document.getElementById('search'); s.value = 'MAGNET'; s.dispatchEvent(new Event('input')); }"
    )
    assert 0 < rows_found(page) < num_with_picture < NUM_TEST
    page.run("document.getElementById('reset').click()")
    assert rows_found(page) == NUM_TEST
    page.run("document.querySelector('#reasons .cell').click()")  # both right
    assert 0 < rows_found(page) < NUM_TEST and page.count("#list .bad") == 0
    assert rows_found(page) == int(page.run("document.querySelector('#reasons .cell strong').textContent"))


def test_pictures_really_show(browser, page_file):
    page = browser.open(page_file)
    page.choose("Class", "IMG", "#examples")
    page.wait_for("document.querySelector('#detail img').complete")
    assert page.run("document.querySelector('#detail img').naturalWidth") == 64
    assert (
        page.run("[...document.querySelectorAll('#list img')].every((i) => i.naturalWidth > 0)")
        and page.count("#list img") > 3
    )


def test_the_browser_of_questions_is_worked_by_keys(browser, page_file):
    page = browser.open(page_file)
    first = page.text("#detail .qid")
    page.press("j")
    second = page.text("#detail .qid")
    assert second != first and page.run("location.hash") == f"#qid={second}"
    page.press("k")
    assert page.text("#detail .qid") == first
    page.press("/")
    assert page.run("document.activeElement.id") == "search" and page.run("document.activeElement.value") == ""
    page.press("Escape")
    page.press("ArrowDown")
    assert page.run("document.activeElement.id") == "list" and page.text("#detail .qid") == second


def test_a_link_opens_its_question_in_whichever_split(browser, page_file, tiny_data):
    qid = list(read_problems(tiny_data.path, "val"))[5]
    page = browser.open(page_file, fragment=f"#qid={qid}")
    assert page.text("#detail .qid") == qid and "validation" in page.text("#detail h3")


def test_a_token_shows_its_own_map_and_enter_holds_it(browser, page_file):
    page = browser.open(page_file)
    opacities = "[...document.querySelectorAll('.veil rect')].map((r) => r.getAttribute('fill-opacity')).join()"
    mean = page.run(opacities)
    assert (
        page.count(".veil rect") == 65
        and page.count(".pick") == 3
        and "Mean of all tokens" in page.text(".map-side .readout")
    )
    page.run("document.querySelector('.tokens').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.run(opacities) != mean and "even would be 1.6 %" in page.text(".map-side .readout")
    assert page.text(".tokens").startswith("Question") and page.text(".tokens").endswith("</s>")
    page.press("Enter")
    page.run("document.querySelector('.tokens').dispatchEvent(new Event('pointerleave'))")
    assert page.run("[...document.querySelectorAll('.token')].findIndex((t) => t.className.includes('now'))") == 1
    page.choose("Model", "answer", "#looking")
    assert "Answer:" in page.text(".tokens")


def test_curves_are_read_with_the_arrow_keys_and_any_metric_can_be_chosen(browser, page_file):
    page = browser.open(page_file)
    page.run("document.querySelector('#curves svg').focus()")
    page.press("Home")
    assert page.text("#curves .readout").split() == ["step", "1", "training", "5", "validation", "0.5"]
    page.choose("Another metric", "gate_opening", "#curves")
    assert page.count("#curves svg") == 10 and "gate opening" in page.text("#curves")


def test_nothing_overflows_on_a_phone_and_focus_is_seen(browser, page_file):
    page = browser.open(page_file, width=360, height=740)
    assert page.run("document.documentElement.scrollWidth") <= 360
    ends = "[...document.querySelectorAll('caption')].map(caption => caption.getBoundingClientRect().right)"
    assert max(page.run(ends)) <= 360
    page.press("Tab")
    assert (
        page.run("document.activeElement.className") == "skip"
        and page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_follows_the_system_and_its_own_switch_and_can_be_read(browser, page_file, dark):
    page = browser.open(page_file, dark=dark)
    is_dark = "parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]) < 128"
    assert page.run(is_dark) is dark and lowest_contrast(page) >= 4.5
    page.run("document.getElementById('theme').click()")
    assert page.run(is_dark) is not dark and lowest_contrast(page) >= 4.5


def lowest_contrast(page):
    """The lowest contrast (WCAG 2) of any text against the colours behind it."""
    return page.run("""(() => {
        const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
        const paint = (colors) => {
            canvas.clearRect(0, 0, 1, 1);
            for (const c of colors) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
            return [...canvas.getImageData(0, 0, 1, 1).data];
        };
        const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
        let lowest = 99;
        for (const element of document.querySelectorAll('main *, header *, nav *, footer *')) {
            const text = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
            if (!text || !element.checkVisibility() || element.closest('button:disabled')) continue;
            const behind = [];
            for (let e = element; e; e = e.parentElement) behind.unshift(getComputedStyle(e).backgroundColor);
            const style = getComputedStyle(element);
            const [a, b] = [
                light(paint([...behind, element instanceof SVGElement ? style.fill : style.color])),
                light(paint(behind)),
            ];
            lowest = Math.min(lowest, (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05));
        }
        return lowest;
    })()""")


@pytest.fixture(scope="module")
def hostile_page(workplace, tmp_path_factory):
    """The report of a run whose questions, rationales, answers and metric names are hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = []
    for split in ("train", "val", "test"):
        for number in range(3):
            texts = {
                "question": f"{HOSTILE} {number}",
                "context": "x" * 100_000 if (split, number) == ("test", 2) else HOSTILE,
                "rationale": HOSTILE,
                "topic": HOSTILE,
                "skill": HOSTILE,
            }
            rows.append(
                {
                    "qid": f"{split}-{number}",
                    "choices": [HOSTILE, "b"],
                    "answer": 0,
                    "split": split,
                    "subject": "natural science",
                }
                | texts
            )
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    overrides = [f"data.path={folder / 'rows.jsonl'}", f"data.shards_dir={folder / 'shards'}", "data.features=null"]
    settings = load_settings(preset="demo", overrides=overrides)
    run = write_run(
        folder / "runs" / "hostile",
        settings,
        prepare_data(settings, lambda line: None),
        spoil=lambda text: text + HOSTILE,
    )
    journal = Journal(run / "logs" / "rationale-metrics.jsonl")
    journal.log(21, {HOSTILE: 1.0})
    journal.note(21, HOSTILE + "\ud800")  # half a character
    journal.close()
    return write_report([run], folder / "report.html")


KINDS = [
    ({"qid": "c", "question": "Hot?", "choices": ["yes", "no"], "answer": 1}, "no", 1),
    ({"qid": "f", "question": "How many?", "answers": ["2", "two"]}, "Two.", "Two."),
    ({"qid": "p", "question": "Describe it.", "text": f"Two magnets {HOSTILE}", "image": "a.png"}, "Three.", "Three."),
    ({"qid": "n", "text": "A bare caption.", "image": "a.png"}, "", None),
    (
        {"qid": "d", "document": [{"image": "a.png"}, {"text": "What?", "role": "user"}, {"text": "A map."}]},
        "a map",
        "a map",
    ),
]


@pytest.fixture(scope="module")
def kinds_page(tmp_path_factory):
    """The report of a run over samples of every kind, its predictions written by hand."""
    folder = tmp_path_factory.mktemp("kinds")
    Image.new("RGB", (8, 8), "red").save(folder / "a.png")
    rows = [row | {"qid": f"{split}-{row['qid']}", "split": split} for split in SPLITS for row, _, _ in KINDS]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    overrides = [f"data.path={folder / 'rows.jsonl'}", f"data.shards_dir={folder / 'shards'}", "data.features=null"]
    overrides += ["run.chain=answer", "answer.format=P-T"]
    settings, run_dir = load_settings(preset="demo", overrides=overrides), RunDir(folder / "run")
    write_text_shards(read_questions(folder / "rows.jsonl"), folder / "shards", samples_per_shard=24)
    commit_json(folder / "shards" / "inputs.json", {"files": {"rows.jsonl": sha256_of_file(folder / "rows.jsonl")}})
    run_dir.predictions.mkdir(parents=True)
    (run_dir.path / "run.yaml").write_text(dump_settings(settings), encoding="utf-8")
    done = {"outputs": {"shards_dir": str(folder / "shards")}, "inputs": {}, "attempt": 1, "seconds": 1.0}
    run_dir.mark_done("data", done | {"step": "data", "mlflow_run_id": None})
    for split in ("val", "test"):
        lines = [
            {"qid": f"{split}-{row['qid']}", "rationale": None, "answer_text": text, "prediction": prediction}
            for row, text, prediction in KINDS
        ]
        (run_dir.predictions / f"{split}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        problems = read_problems(folder / "shards", split)
        commit_json(run_dir.scores(split), score(lines, problems, split=split, gold_reasons=settings.gold_reasons))
    return write_report([run_dir.path], folder / "report.html", num_looked_at=0)


def test_free_answers_pairs_and_documents_are_shown_with_what_is_accepted(browser, kinds_page):
    shown = {}
    for row, _, _ in KINDS:
        page = browser.open(kinds_page, fragment=f"#qid=test-{row['qid']}")
        assert page.problems == [] and page.text("#detail .qid") == f"test-{row['qid']}"
        shown[row["qid"]] = page.text("#detail")
    assert "answered right" in shown["c"] and page.count("#list li") == len(KINDS)
    assert "Accepted answers" in shown["f"] and "two" in shown["f"] and "answered right" in shown["f"]
    assert "Describe it." in shown["p"] and "<script>alert(1)</script>" in shown["p"] and "answered wrong" in shown["p"]
    assert "A bare caption." in shown["n"] and "answer not readable" in shown["n"]
    assert "<image> User: What?" in shown["d"] and "A map." in shown["d"] and "answered right" in shown["d"]
    assert "A bare caption." in page.text("#list") and page.count("main script") == 0
    for label in ("exact match", "VQA accuracy", "ANLS", "ROUGE-L of answers", "60.00"):  # 3 of 5 are right
        assert label in page.text("#scores")


def test_hostile_text_is_shown_as_text(browser, hostile_page):
    page = browser.open(hostile_page, fragment="#qid=test-1")
    assert page.problems == []
    shown = page.text("#detail .question")
    assert (
        "<script>alert(1)</script>" in shown
        and "\U0001f600" in shown
        and "\u2400\u2407" in shown
        and "{{DATA}}" in shown
    )
    assert (
        page.run("[...document.querySelectorAll('main script, main img, [onerror]')].length") == 0
        and page.count("script") == 2
    )
    assert page.run("getComputedStyle(document.querySelector('#detail .question')).unicodeBidi") in (
        "isolate",
        "plaintext",
    )
    assert page.count("#detail mark") > 0 and "alert(2)" in page.text("#detail .pair")


def test_a_very_long_text_breaks_nothing(browser, hostile_page):
    page = browser.open(hostile_page, fragment="#qid=test-2", width=360, height=740)
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert (
        "80,000 characters more" in page.text("#detail .context")
        and page.run("document.querySelector('#detail .context').clientHeight") < 300
    )


def test_two_runs_are_compared(browser, run, workplace, tiny_settings, tiny_data):
    changed = tiny_settings.model_copy(
        update={"training": tiny_settings.training.model_copy(update={"learning_rate": 0.123})}
    )
    other = write_run(workplace / "runs" / "other", changed, tiny_data, wrong=3)
    page = browser.open(write_report([run, other], workplace / "both.html", num_looked_at=0))
    assert page.problems == []
    assert page.text("h1") == "demo (seeing) and demo (other)" and page.count("#reasons table") == 3
    assert page.count("#curves .line") == 2 * 2 * 5  # runs, stages, four metrics and the validation loss
    assert (
        "training.learning_rate" in page.text("#settings")
        and "0.123" in page.text("#settings")
        and "data.features" not in page.text("#settings")
    )
    button = "[...document.querySelectorAll('#reasons button')].find((b) => b.textContent.startsWith('List the'))"
    number = int(re.search(r"\d+", page.run(f"{button}.textContent"))[0])
    page.run(f"{button}.click()")
    assert 0 < number < NUM_TEST and rows_found(page) == number and page.count("#detail .said") == 2
    assert page.run("document.documentElement.scrollWidth") <= 1200


def test_a_half_finished_run_says_what_is_missing(browser, workplace, tiny_settings, tiny_data, model_dir):
    half = write_run(
        workplace / "runs" / "half", tiny_settings, tiny_data, until="train-rationale", model_dir=model_dir
    )
    page = browser.open(write_report([half], half / "report.html", num_looked_at=2))
    assert page.problems == []
    missing = page.text("#missing")
    assert (
        "Step 'rationales' is not done" in missing
        and "Step 'evaluate' is not done" in missing
        and "Step 'data'" not in missing
    )
    assert (
        "no scores yet" in page.text("#scores")
        and rows_found(page) == NUM_TEST
        and "Nothing was written" in page.text("#detail")
    )
    assert page.count("#looking option") == 1 and page.count("#curves svg") == 4


def test_a_run_that_has_only_begun_and_one_whose_data_is_gone_still_have_a_page(
    browser, workplace, tiny_settings, tiny_data
):
    begun = workplace / "runs" / "begun"
    begun.mkdir()
    (begun / "run.yaml").write_text(
        dump_settings(
            tiny_settings.model_copy(update={"data": tiny_settings.data.model_copy(update={"shards_dir": None})})
        ),
        encoding="utf-8",
    )
    page = browser.open(write_report([begun], begun / "report.html"))
    assert (
        page.problems == []
        and "Step 'data' is not done" in page.text("#missing")
        and "No questions" in page.text("#examples")
    )
    gone = write_run(workplace / "runs" / "gone", tiny_settings, tiny_data)
    marker = json.loads((gone / "steps" / "data.json").read_text())
    commit_json(gone / "steps" / "data.json", marker | {"outputs": {"shards_dir": str(workplace / "nowhere")}})
    page = browser.open(write_report([gone], gone / "report.html"))
    assert (
        page.problems == []
        and "The data folder does not exist" in page.text("#missing")
        and "validation, 16 questions" in page.text("#scores")
    )


def test_pictures_that_are_gone_are_said_to_be(run, tiny_settings, monkeypatch):
    monkeypatch.setattr("launcher.report.collect.find_pictures", lambda *parts: None)
    data = collect([run], num_pictures=9, num_looked_at=0)
    assert data["pictures"] == [] and "pictures are not available" in data["runs"][0]["missing"][0]
    assert "pictures are not available" in render(data)


def test_features_that_are_no_grid_show_the_gate_alone(browser, run, tmp_path, monkeypatch):
    monkeypatch.setattr("launcher.report.attention.ENCODERS", {})
    page = browser.open(write_report([run], tmp_path / "report.html", num_looked_at=1))
    assert page.problems == [] and "only the gate is shown" in page.text("#looking")
    assert page.count(".veil") == 0 and page.count(".token") > 5 and "gate open" in page.text(".map-side .readout")


def test_the_table_of_scores_begins_with_the_average_and_has_no_column_of_dashes(browser, page_file):
    page = browser.open(page_file)
    assert page.problems == []
    lines = page.text("#scores").split("\n")
    heads = next(line.split() for line in lines if "AVG" in line.split() and "NAT" in line.split())
    assert heads[0] == "AVG" and "Similarity" not in page.text("#scores")


def test_a_fusion_without_attention_maps_says_so_on_its_page(browser, run, tmp_path, monkeypatch):
    monkeypatch.setattr(GatedCrossAttention, "attention_maps", lambda *arguments: None)
    page = browser.open(write_report([run], tmp_path / "report.html", num_looked_at=1))
    assert page.problems == [] and "has no attention maps" in page.text("#looking")
    assert page.count(".veil") == 0 and page.count(".token") == 0


def test_a_run_without_a_vote_has_no_section_of_agreement(browser, page_file):
    page = browser.open(page_file)
    assert page.run("document.getElementById('agreement').hidden") is True
    assert "Agreement" not in page.text("#nav") and "agreement" not in page.text("#detail")


def test_accuracy_by_agreement_is_shown_with_the_numbers_of_questions(browser, workplace, tiny_settings, tiny_data):
    # 16 test questions: the first cannot be read, every fourth after the second is wrong.
    folder = write_run(workplace / "runs" / "voted", tiny_settings, tiny_data, agreements=(0.25, 0.25, 1.0, 0.5))
    page = browser.open(write_report([folder], folder / "report.html", num_looked_at=0))
    assert page.problems == [] and "Agreement" in page.text("#nav")
    tables = page.run("[...document.querySelectorAll('#agreement caption')].map((each) => each.textContent)")
    assert [each.split(",")[0] for each in tables] == [
        f"Accuracy by agreement of the {what}" for what in ("answers", "rationales") * 2
    ]
    assert "mean agreement 0.500" in tables[0] and "mean agreement 0.250" in tables[1]
    rows = page.run(
        "[...document.querySelector('#agreement table').tBodies[0].rows].map((row) => "
        "[...row.cells].map((cell) => cell.textContent))"
    )
    assert rows == [
        ["0 to 0.25", "", "37.50", "3 / 8"],
        ["above 0.25 to 0.5", "", "100.00", "4 / 4"],
        ["above 0.5 to 0.75", "", "\u2013", "0 / 0"],
        ["above 0.75 to 1", "", "100.00", "4 / 4"],
    ]
    assert page.run("document.querySelector('#agreement table').querySelectorAll('.bar').length") == 3
    assert "agreement of the answers 0." in page.text("#detail")


def test_two_runs_have_their_agreement_side_by_side(browser, run, workplace, tiny_settings, tiny_data):
    one, other = (
        write_run(workplace / "runs" / f"voted-{share}", tiny_settings, tiny_data, agreements=(share,))
        for share in (0.5, 1.0)
    )
    page = browser.open(write_report([one, run, other], workplace / "voted.html", num_looked_at=0))
    assert page.problems == [] and page.count("#agreement table") == 4
    assert page.run("document.querySelector('#agreement table').tBodies[0].rows.length") == 4 * 2
    # One bin of four has questions in each of two runs: for two splits, answers and rationales.
    assert page.count("#agreement .bar") == 2 * 4 and page.run("document.documentElement.scrollWidth") <= 1200
