import csv
import io
import re

import matplotlib as mpl
import numpy as np
import pytest

from quantwm.envs.wall import Wall
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.report import render, task_report, write_report
from quantwm.report.arms import choose_episode, worst_arm
from quantwm.report.filmstrip import MOST_FRAMES, choose_scenes, strips
from quantwm.report.headline import study_lead
from quantwm.report.plots import success_plot
from quantwm.report.text import signed
from quantwm.study.findings import findings_of
from quantwm.study.store import ResultsFolder
from quantwm.study.summary import COLUMNS
from report_support import (
    ENVIRONMENT,
    TASK,
    Document,
    browse,
    make_config,
    make_study,
    make_summary,
    needs_browser,
    one_task,
    write_folder,
)

# Successes of 16 episodes, and stored bytes, as a study might find them.
STUDY = {
    "oracle-state": ("1111111111111111", None),
    "oracle-latent": ("1111111111111101", None),
    "float": ("1111111111111101", 96_400_000),
    "w8a8": ("1111111111111101", 27_312_448),
    "w4": ("1111011101110101", 16_120_832),
    "w4g128": ("1111111101111101", 16_804_112),
    "w4a4-token": ("1101011101110001", 16_120_832),
    "w3": ("0001000000000000", 13_322_240),
    "w2": ("0000000000000000", 10_524_160),
}


def rendered(arms, **changes):
    return render([one_task(arms, **changes)]).html


@pytest.fixture(scope="module")
def page():
    return rendered(STUDY)


def test_the_table_holds_the_numbers_of_the_rows(page):
    document = Document(page)
    rows, summary = make_study(STUDY)
    for line in summary:
        own = [row for row in rows if row["arm"] == line["arm"]]
        cells = document.line(line["arm"])
        solved = sum(row["success"] for row in own)
        assert cells[1] == f"{solved / 16:.2f}"
        low, high = line["low"], line["high"]
        assert cells[2].replace("\xa0", " ") == f"[{low:.2f}, {high:.2f}]"
        assert cells[11] == f"{line['seconds']:.0f}"
        if line["bytes"]:
            assert str(line["bytes"]) in document.values("value")
            assert cells[10] == f"{line['bytes'] / 1e6:.1f} MB"
        else:
            assert cells[10] == "–"
        firsts = [row["first_success"] for row in own if row["success"]]
        assert cells[9] == (f"{np.median(firsts):.1f}" if firsts else "–")


def test_a_difference_is_shown_with_its_interval_and_counts(page):
    cells = [cell.replace("\xa0", " ") for cell in Document(page).line("w3")]
    rows, summary = make_study(STUDY)
    solved = {arm: [row["success"] for row in rows if row["arm"] == arm] for arm in ("float", "w3")}
    won = sum(w3 and not f for w3, f in zip(solved["w3"], solved["float"], strict=True))
    lost = sum(f and not w3 for w3, f in zip(solved["w3"], solved["float"], strict=True))
    line = next(line for line in summary if line["arm"] == "w3")
    low, high = line["difference_low"], line["difference_high"]
    assert cells[3] == signed((won - lost) / 16)
    assert cells[4] == f"[{signed(low)}, {signed(high)}]"
    assert cells[5:9] == [f"{won} / {lost}", "< 0.001", "< 0.001", "yes, lower"]


def arms_csv(task):
    text = render([task]).tables["report-tables/wall-arms.csv"]
    return {line["arm"]: line for line in csv.DictReader(io.StringIO(text))}


def test_an_arm_of_another_budget_is_paired_with_float_of_that_budget():
    arms = {
        "float/steps=20": ("1111111111111110", 9),
        "float": ("1100000000000000", 9),
        "w3": ("1000000000000000", 3),
        "w3/steps=20": ("0111111000000001", 3),
    }
    line = arms_csv(one_task(arms))["w3/steps=20"]
    assert (line["won"], line["lost"]) == ("1", "9")
    assert float(line["difference"]) == (1 - 9) / 16


def test_a_float_arm_of_another_budget_is_no_quantized_arm():
    arms = {"float/steps=20": ("1" * 16, 9), "float": ("0" * 16, 9), "w3": ("1" + "0" * 15, 3)}
    task = one_task(arms)
    assert [(arm.name, arm.role, arm.verdict) for arm in task.arms] == [
        ("float", "float", "reference"),
        ("float/steps=20", "other float", "higher"),
        ("w3", "quantized", "not separable"),
    ]
    text = Document(render([task]).html).text
    assert "Separably higher" not in text
    assert "Oracles, which know more" not in text
    assert worst_arm(one_task(arms | {"float/steps=20": ("0" * 16, 9)}).arms).name == "w3"


def test_p_values_are_corrected_over_the_arms_of_the_table():
    arms = dict.fromkeys(("float", "w8", "w4", "w3", "w2"), ("10", 1))
    rows, summary = make_study(arms)
    for line, p_value in zip(summary, (None, 0.03, 0.01, None, 0.04), strict=True):
        line["p_value"] = p_value
    task = task_report(rows, summary, make_config(arms), {}, TASK)
    adjusted = {arm: line["p_holm"] for arm, line in arms_csv(task).items() if line["p_holm"]}
    assert {arm: float(value) for arm, value in adjusted.items()} == pytest.approx(
        {"w8": 0.06, "w4": 0.03, "w2": 0.06}
    )
    document = Document(render([task]).html)
    assert document.line("w8")[6:8] == ["0.030", "0.060"]
    assert document.line("w3")[6:8] == ["–", "–"]
    assert "p, Holm, where a table has it" in document.text


@pytest.mark.parametrize(
    ("low", "high", "p_value", "verdict"),
    [
        (-0.9, -0.2, 0.001, "lower"),
        (0.2, 0.9, 0.001, "higher"),
        (-0.9, 0.0, 0.001, "not separable"),
        (-0.56, -0.03, 0.0625, "not separable"),
        (-0.9, -0.2, None, "not separable"),
    ],
)
def test_a_difference_is_called_only_where_interval_and_test_support_it(
    low, high, p_value, verdict
):
    compared = {"difference": -0.4, "difference_low": low, "difference_high": high}
    if verdict == "higher":
        compared["difference"] = 0.4
    arms = {"float": ("10", 1), "w4": ("10", 1)}
    rows, (reference, line) = make_study(arms)
    line |= compared | {"p_value": p_value}
    task = task_report(rows, [reference, line], make_config(arms), {}, TASK)
    assert [arm.verdict for arm in task.arms] == ["reference", verdict]


def test_the_headline_claims_what_is_separable_and_nothing_else(page):
    text = Document(page).text
    separable = re.search(r"Separably lower than float: (.*?\])\.", text)[1]
    assert re.findall(r"(w\S+) [−+]", separable) == ["w3", "w2"]
    open_arms = re.search(r"Not separable from float: (.*?\])\.", text)[1]
    assert re.findall(r"(w\S+) [−+0]", open_arms) == ["w8a8", "w4", "w4g128", "w4a4-token"]
    assert "losses of up to 0.56 (w4a4-token) fit these episodes too" in text
    assert "smallest of these are w4 and w4a4-token, at 16.1 MB against 96.4 MB (6.0" in text
    assert "float reaches the goal in 15 of 16 episodes: 0.94 [0.72, 0.99]" in text


def test_plots_describe_the_rows_in_words(page):
    described = " ".join(Document(page).values("aria-label"))
    rows, _ = make_study(STUDY)
    own = [row["success_by_iteration"] for row in rows if row["arm"] == "w4"]
    curve = ", ".join(f"{np.mean(column):.2f}" for column in zip(*own, strict=True))
    assert f"Success of w4 after 0 to 6 MPC iterations: {curve}." in described
    assert "w3 −0.88 (−1.00 to −0.56, lower)" in described
    assert "w8a8 27.3 MB" in described


def test_a_plotted_marker_lies_at_its_value():
    task = one_task({"float": ("1" * 8 + "0" * 8, 10), "w2": ("0" * 16, 5)})
    svg = success_plot(task.arms, "wall")
    markers = [float(x) for x in re.findall(r'<use [^>]*\bx="([\d.]+)"', svg)]
    ticks = [float(x) for x in re.findall(r'<text [^>]*x="([\d.]+)"[^>]*>(?:0|0\.5|1)</text>', svg)]
    zero, half, one = ticks
    assert half == pytest.approx((zero + one) / 2)
    assert [half, zero] == pytest.approx([m for m in markers if zero <= m <= one][-2:])


def test_the_page_loads_nothing_and_its_ids_are_unique(page):
    document = Document(page)
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert all(source.startswith("data:image/webp;base64,") for source in document.values("src"))
    ids = document.values("id")
    assert len(ids) == len(set(ids)) > 0
    references = [h for h in document.values("href") if h.startswith("#")]
    references += re.findall(r"url\(([^)]*)\)", page)
    assert {reference.removeprefix("#") for reference in references} <= set(ids)
    assert "script" not in {tag for tag, _ in document.tags}
    assert len(page) < 1_500_000


def test_the_page_can_be_read_by_a_screen_reader(page):
    document = Document(page)
    assert ("html", {"lang": "en"}) in document.tags
    assert "<title>Wall: planning with a quantized world model</title>" in page
    assert all(attributes.get("alt") for tag, attributes in document.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in document.tags if tag == "svg")
    assert all("scope" in attributes for tag, attributes in document.tags if tag == "th")


def test_colours_follow_the_page(page):
    style, _, body = page.partition("</style>")
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"#[0-9a-f]{6}\b", body.split("<h2>Configuration")[0])
    defined = set(re.findall(r"(--\w+):", style))
    assert set(re.findall(r"var\((--\w+)\)", page)) <= defined


def test_the_same_input_gives_the_same_page(page):
    assert rendered(STUDY) == page


def test_a_users_matplotlib_settings_change_nothing(page):
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path"}):
        assert rendered(STUDY) == page
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'a" onload="x', "$x$ 模型 & co"])
def test_text_from_outside_is_escaped(name):
    arms = {"float": ("11", 10), name: ("00", 5)}
    rows, summary = make_study(arms)
    for row in rows:
        row["failure"] = None if row["success"] else f"non_finite: {name}"
    summary = [line | {"note": name} for line in summary]
    config = make_config(arms) | {"name": name}
    task = task_report(rows, summary, config, {"processor": name}, TASK)
    page = render([task], command=f"run {name}").html
    document = Document(page)
    tags = {tag for tag, _ in document.tags}
    assert "script" not in tags
    assert not [a for _, a in document.tags if "onload" in a]
    assert document.line(name)[0] == name
    assert document.text.count(name) >= 6


def test_the_worst_arm_succeeds_least_and_ends_farthest():
    assert worst_arm(one_task(STUDY).arms).name == "w2"
    arms = {"float": ("11", 1), "w3": ("01", 1), "w2": ("01", 1)}
    tied, summary = make_study(arms)
    for row in tied:
        row["final_distance"] += 5.0 * (row["arm"] == "w3")
    assert worst_arm(task_report(tied, summary, make_config(arms), {}, TASK).arms).name == "w3"
    oracles_fail = one_task({"oracle-state": ("00", None), "float": ("01", 1)})
    assert worst_arm(oracles_fail.arms) is None


@pytest.mark.parametrize(
    ("reference", "worst", "episode", "reason"),
    [
        ("0111", "1100", 2, "the first of 2 that float solves and w2 fails"),
        ("0101", "0101", 0, "the first one; there is none that float solves and w2 fails"),
    ],
)
def test_the_episode_shown_is_one_that_only_float_solves(reference, worst, episode, reason):
    choice = choose_episode(one_task({"float": (reference, 1), "w2": (worst, 1)}).arms)
    assert (choice.episode, choice.reason) == (episode, reason)


def test_the_filmstrip_shows_the_task_s_frames_of_both_arms():
    arms = one_task({"float": ("1", 1), "w2": ("0", 1)}).arms
    scenes, _ = choose_scenes(arms, {})
    shown = strips(scenes, TASK)
    assert [len(strip.stills) for strip in shown] == [arms[0].rows[0]["iterations"] + 1, 7]
    assert shown[0].goal.image == shown[1].goal.image == shown[0].stills[-1].image
    assert shown[0].stills[0].image == shown[1].stills[0].image != shown[0].goal.image
    assert shown[0].stills[-1].reached
    assert not any(still.reached for still in shown[1].stills)
    distances = [still.distance for still in shown[1].stills]
    assert distances == arms[1].rows[0]["distance_by_iteration"]


def test_a_long_episode_shows_its_first_and_last_states():
    arms = one_task({"float": ("0", 1)}).arms
    row = arms[0].rows[0]
    row |= {"states": row["states"] * 7, "distance_by_iteration": list(range(49))}
    stills = strips(choose_scenes(arms, {})[0], TASK)[0].stills
    assert len(stills) == MOST_FRAMES
    assert (stills[0].iteration, stills[-1].iteration) == (0, 48)


def test_states_that_are_not_finite_are_left_blank():
    arms = {"float": ("1", 1), "w2": ("0", 1)}
    rows, summary = make_study(arms)
    broken = rows[1]
    broken["states"][2:] = [[float("nan"), 1.0]] * 5
    broken["distance_by_iteration"][2:] = [float("nan")] * 5
    broken |= {"final_distance": float("nan"), "failure": "non_finite: latent of frame 2"}
    page = render([task_report(rows, summary, make_config(arms), {}, TASK)]).html
    assert page.count('class="blank"') == 5
    assert not re.search(r"\bnan\b", Document(page).text.lower())
    assert Document(page).line("w2", table=-1)[1:4] == [
        "non_finite: latent of frame 2",
        "1 of 1",
        "–",
    ]


def test_frames_that_compress_badly_are_made_smaller():
    class Noise(Wall):
        def observe(self, states, layout):
            shape = (*states.shape[:2], 448, 448, 3)
            visual = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            return {"visual": visual, "proprio": states.astype(np.float32)}

    arms = {"float": ("1", 1), "w2": ("0", 1)}
    rows, summary = make_study(arms)
    task = task_report(rows, summary, make_config(arms), {}, Noise())
    assert len(render([task]).html) < 1_500_000


def test_failures_are_counted_by_arm_and_reason():
    task = one_task({"float": ("1111", 1), "w2": ("0001", 1)})
    task.arms[1].rows[1]["failure"] = "non_finite: cost"
    table = Document(render([task]).html).tables[-1]
    assert [(line[0], line[1], line[2], line[4]) for line in table[1:]] == [
        ("w2", "non_finite: cost", "1 of 4", "1"),
        ("w2", "goal not reached", "2 of 4", "0, 2"),
    ]


@pytest.mark.parametrize(
    "arms",
    [
        {"float": ("11", 10)},
        {"w4": ("10", 10)},
        {"oracle-state": ("11", None)},
        {"float": ("11", None), "w4": ("11", None)},
        {"float": ("000", 10), "w4": ("000", 5), "w2": ("000", 2)},
        {"float": ("111", 10), "w4": ("111", 5), "oracle-latent": ("111", None)},
    ],
    ids=["float alone", "no float", "oracle alone", "no bytes", "all fail", "all succeed"],
)
def test_unusual_studies_have_a_report(arms):
    text = Document(rendered(arms)).text
    assert ("No episode failed." in text) == all("0" not in solved for solved, _ in arms.values())
    assert ("has no float arm" in text) == ("float" not in arms)
    assert "Separably" not in text
    assert ("gate" in text.split("Configuration")[0]) == (arms.get("float", "1")[0] == "000")


def test_an_arm_whose_name_does_not_say_it_is_known_by_its_kind():
    arms = {
        "full": ("11", 9),
        "again": ("11", 9),
        "cheat": ("11", None),
        "chance": ("00", None),
        "small": ("01", 3),
    }
    rows, summary = make_study(arms)
    kinds = {"full": "float", "again": "float", "cheat": "oracle-state", "chance": "random"}
    task = task_report(rows, summary, make_config(arms, kinds), {}, TASK)
    shown = [(arm.name, arm.role) for arm in task.arms]
    assert shown == [
        ("full", "float"),
        ("again", "other float"),
        ("small", "quantized"),
        ("cheat", "bound"),
        ("chance", "bound"),
    ]
    assert "3 arms on" in study_lead([task])
    assert "; 2 reference arms beside them" in study_lead([task])


def test_arms_that_did_not_run_are_named():
    rows, summary = make_study({"float": ("00", 1)})
    task = task_report(rows, summary, make_config(["float", "w4", "w2"]), {}, TASK)
    assert "Not run: w4 and w2." in Document(render([task]).html).text


def test_a_summary_of_other_rows_is_refused():
    arms = {"float": ("11", 1), "w4": ("10", 1)}
    rows, summary = make_study(arms)

    def read(rows, summary, names=tuple(arms)):
        return task_report(rows, summary, make_config(names), {}, TASK)

    with pytest.raises(MismatchError, match=r"'w4': the summary says success 0\.9.*say 0\.5"):
        read(rows, [summary[0], summary[1] | {"success": 0.9}])
    with pytest.raises(MismatchError, match="'w4', which the summary lacks"):
        read(rows, summary[:1])
    with pytest.raises(MismatchError, match="'w4', of which there are no episodes"):
        read(rows[:2], summary)
    with pytest.raises(MismatchError, match="'w4', which the study's configuration lacks"):
        read(rows, summary, ["float"])
    with pytest.raises(UsageError, match="no arm"):
        read([], [])


def make_folder(path, arms):
    rows, summary = make_study(arms)
    write_folder(path, rows, summary, make_config(arms))
    return rows, summary


def test_a_results_folder_gives_the_same_page_as_its_rows(tmp_path):
    arms = {"oracle-state": ("11", None), "float": ("11", 10), "w4": ("10", 5)}
    rows, summary = make_folder(tmp_path, arms)
    written = write_report(tmp_path)
    assert written == tmp_path / "report.html"
    environment = ENVIRONMENT | {"model_hash": "ab12"}
    task = task_report(rows, summary, make_config(arms), environment, TASK)
    expected = render([task], findings_of([task.results]))
    assert written.read_text(encoding="utf-8") == expected.html
    for name, text in expected.tables.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text


def test_planning_time_is_that_of_the_rows_even_where_the_summary_lacks_it(tmp_path):
    arms = {"float": ("11", 10), "w4": ("10", 5)}
    rows, _ = make_study(arms)
    for row, seconds in zip(rows, (1.0, 2.0, 3.0, 7.125), strict=True):
        row["plan_seconds"] = seconds
    own = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    summary = make_summary(own, {arm: stored for arm, (_, stored) in arms.items()})
    assert [line["plan_seconds"] for line in summary] == [1.5, 5.062]
    write_folder(tmp_path, rows, summary, make_config(arms))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert Document(page).line("w4")[12] == "5.1"
    older = [{k: v for k, v in line.items() if k != "plan_seconds"} for line in summary]
    columns = [column for column in COLUMNS if column != "plan_seconds"]
    ResultsFolder(tmp_path).write_summary(older, columns)
    assert write_report(tmp_path).read_text(encoding="utf-8") == page


def test_configuration_environment_and_command_are_shown(tmp_path):
    make_folder(tmp_path, {"float": ("11", 10)})
    command = "quantwm study wall --preset quick"
    text = Document(write_report(tmp_path, command=command).read_text(encoding="utf-8")).text
    for fact in (command, "planner.samples 64", "A <fast> CPU", "seed block evaluation"):
        assert fact in text
    for fact in ("torch 2.13.0", "threads 2", "dtype bfloat16", "model_hash ab12", "commit none"):
        assert fact in text


def test_a_folder_that_is_not_finished_is_refused(tmp_path):
    with pytest.raises(MismatchError, match=r"config\.yaml, episodes\.parquet, summary\.csv"):
        write_report(tmp_path)
    make_folder(tmp_path, {"float": ("11", 10)})
    (tmp_path / "summary.csv").write_text("arm,success\nfloat,1.0\n")
    with pytest.raises(CorruptFileError, match="lacks low, high"):
        write_report(tmp_path)


@needs_browser
def test_a_browser_opens_the_page_without_errors(tmp_path, page):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    assert browse(file.as_uri(), tmp_path / "profile").count("<svg") == page.count("<svg")
