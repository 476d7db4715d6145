import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib as mpl
import numpy as np
import pytest

from quantwm.envs.wall import Wall
from quantwm.errors import CorruptFileError, MismatchError, UsageError
from quantwm.report import render, write_report
from quantwm.report.arms import arms_of, choose_episode, worst_arm
from quantwm.report.filmstrip import MOST_FRAMES, strips
from quantwm.report.plots import success_plot
from quantwm.report.text import signed
from quantwm.study.store import ResultsFolder
from quantwm.study.summary import COLUMNS, arm_summary

ITERATIONS = 6
TASK = Wall()
ENVIRONMENT = {"python": "3.11.9", "torch": "2.13.0", "processor": "A <fast> CPU", "commit": None}

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


def make_rows(arm, solved, failure="not_reached"):
    """Episodes that walk through the door to the goal, or get stuck on the way."""
    episodes = TASK.episodes(range(100, 100 + len(solved)))
    return [
        make_row(arm, index, success == "1", failure, episodes)
        for index, success in enumerate(solved)
    ]


def make_row(arm, index, success, failure, episodes):
    first = 1 + (index + len(arm)) % 3 if success else None
    iterations = first or ITERATIONS
    start, goal = episodes.start[index], episodes.goal[index]
    door = np.array([32.0, 30.0])
    states = [start]
    for step in range(1, iterations + 1):
        share = step / iterations if success else min(0.42, 0.2 * step)
        to_door, beyond = min(1.0, 2 * share), max(0.0, 2 * share - 1)
        states.append(start + (door - start) * to_door + (goal - door) * beyond)
    distances = [float(TASK.distance(state, goal)) for state in states]
    return {
        "schema_version": 1,
        "cell": f"cell-{arm}",
        "arm": arm,
        "task": "wall",
        "layout": json.dumps({"door_y": 30, "wall_x": 32}),
        "block": "evaluation",
        "seed": 1,
        "episode": index,
        "episode_seed": 100 + index,
        "success": success,
        "success_by_iteration": [success and i >= iterations for i in range(ITERATIONS + 1)],
        "first_success": first,
        "iterations": iterations,
        "failure": None if success else failure,
        "final_distance": distances[-1],
        "distance_by_iteration": distances,
        "cost_by_iteration": distances[1:],
        "states": [state.tolist() for state in states],
        "goal": goal.tolist(),
        "plan_seconds": 1.5,
        "peak_memory_mb": 900.0,
        "provenance": json.dumps({"torch": "2.13.0", "dtype": "bfloat16", "threads": 2}),
    }


def make_study(arms):
    """Rows and summary of `arms`, given as {name: (successes, bytes)}."""
    rows = {name: make_rows(name, solved) for name, (solved, _) in arms.items()}
    reference = rows.get("float")
    summary = [
        arm_summary(
            name,
            rows[name],
            reference if name != "float" else None,
            bytes=stored,
            seconds=40.0 + 3 * len(name),
        )
        for name, (_, stored) in arms.items()
    ]
    return [row for one in rows.values() for row in one], summary


def make_config(names):
    kinds = {name: name if name == "float" or "oracle" in name else "quantized" for name in names}
    return {
        "version": 1,
        "name": "quick",
        "task": {"name": "wall", "wall_x": 32, "door_y": 30, "version": 1},
        "model": "wall",
        "arms": [{"name": name, "kind": kind} for name, kind in kinds.items()],
        "episodes": 16,
        "seed": 1,
        "block": "evaluation",
        "mpc_iterations": ITERATIONS,
        "planner": {"samples": 64, "elites": 8, "horizon": 5, "noise": "ar1", "correlation": 0.8},
        "dtype": "bfloat16",
        "device": "cpu",
        "threads": 2,
        "gate": 0.7,
    }


def rendered(arms):
    rows, summary = make_study(arms)
    return render(rows, summary, make_config(arms), ENVIRONMENT, TASK)


@pytest.fixture(scope="module")
def page():
    return rendered(STUDY)


class Document(HTMLParser):
    """What the tests look at: table cells by arm, attributes, ids, text and unclosed tags."""

    VOID = {"meta", "link", "img", "br"}  # noqa: RUF012

    def __init__(self, html):
        super().__init__()
        self.tables, self.tags, self.open, self.words = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag not in ("span", "b"):
            self.words.append(" ")

    def handle_data(self, data):
        if not {"style", "svg"} & set(self.open):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th", "data"):
            self.tables[-1][-1][-1] += data

    @property
    def text(self):
        return " ".join("".join(self.words).replace("\xa0", " ").split())

    def line(self, arm, table=0):
        return next(line for line in self.tables[table] if line and line[0] == arm)

    def values(self, key):
        return [attributes[key] for _, attributes in self.tags if key in attributes]


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
        assert str(line["seconds"]) in document.values("value")
        if line["bytes"]:
            assert str(line["bytes"]) in document.values("value")
            assert cells[9] == f"{line['bytes'] / 1e6:.1f} MB"
        else:
            assert cells[9] == "–"
        firsts = [row["first_success"] for row in own if row["success"]]
        assert cells[8] == (f"{np.median(firsts):.1f}" if firsts else "–")


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
    assert cells[5:8] == [f"{won} / {lost}", "< 0.001", "yes, lower"]


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
    line = {"arm": "w4", "success": 0.5, "low": 0.3, "high": 0.7, "episodes": 16}
    compared = {"difference": -0.4, "difference_low": low, "difference_high": high}
    if verdict == "higher":
        compared["difference"] = 0.4
    (arm,) = arms_of([], [line | compared | {"p_value": p_value}], {})
    assert arm.verdict == verdict


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
    rows, summary = make_study({"float": ("1" * 8 + "0" * 8, 10), "w2": ("0" * 16, 5)})
    svg = success_plot(arms_of(rows, summary, {}))
    markers = [float(x) for x in re.findall(r'<use [^>]*\bx="([\d.]+)"', svg)]
    ticks = [float(x) for x in re.findall(r'<text [^>]*x="([\d.]+)"[^>]*>(?:0|0\.5|1)</text>', svg)]
    zero, half, one = ticks
    assert half == pytest.approx((zero + one) / 2)
    assert [half, zero] == pytest.approx([m for m in markers if zero <= m <= one][-2:])


def test_the_page_loads_nothing_and_its_ids_are_unique(page):
    document = Document(page)
    assert "http" not in page.replace("http-equiv", "")
    assert "@import" not in page
    assert all(source.startswith("data:image/png;base64,") for source in document.values("src"))
    ids = document.values("id")
    assert len(ids) == len(set(ids)) > 0
    references = [h for h in document.values("href") if h != "data:,"]
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
    rows = [row | {"failure": None if row["success"] else f"non_finite: {name}"} for row in rows]
    summary = [line | {"note": name} for line in summary]
    config = make_config(arms) | {"name": name}
    page = render(rows, summary, config, {"processor": name}, TASK, command=f"run {name}")
    document = Document(page)
    tags = {tag for tag, _ in document.tags}
    assert "script" not in tags
    assert not [a for _, a in document.tags if "onload" in a]
    assert document.line(name)[0] == name
    assert document.text.count(name) >= 6


def test_the_worst_arm_succeeds_least_and_ends_farthest():
    rows, summary = make_study(STUDY)
    arms = arms_of(rows, summary, make_config(STUDY))
    assert worst_arm(arms).name == "w2"
    tied, summary = make_study({"float": ("11", 1), "near": ("01", 1), "far": ("01", 1)})
    for row in tied:
        row["final_distance"] += 5.0 * (row["arm"] == "far")
    assert worst_arm(arms_of(tied, summary, {})).name == "far"
    oracles_fail, summary = make_study({"oracle-state": ("00", None), "float": ("01", 1)})
    assert worst_arm(arms_of(oracles_fail, summary, {})) is None


@pytest.mark.parametrize(
    ("reference", "worst", "episode", "reason"),
    [
        ("0111", "1100", 2, "the first of 2 that float solves and w2 fails"),
        ("0101", "0101", 0, "the first one; there is none that float solves and w2 fails"),
    ],
)
def test_the_episode_shown_is_one_that_only_float_solves(reference, worst, episode, reason):
    rows, summary = make_study({"float": (reference, 1), "w2": (worst, 1)})
    choice = choose_episode(arms_of(rows, summary, {}))
    assert (choice.episode, choice.reason) == (episode, reason)


def test_the_filmstrip_shows_the_task_s_frames_of_both_arms():
    rows, summary = make_study({"float": ("1", 1), "w2": ("0", 1)})
    arms = arms_of(rows, summary, {})
    shown = strips(arms, choose_episode(arms), TASK)
    assert [len(strip.stills) for strip in shown] == [arms[0].rows[0]["iterations"] + 1, 7]
    assert shown[0].goal.image == shown[1].goal.image == shown[0].stills[-1].image
    assert shown[0].stills[0].image == shown[1].stills[0].image != shown[0].goal.image
    assert shown[0].stills[-1].reached
    assert not any(still.reached for still in shown[1].stills)
    distances = [still.distance for still in shown[1].stills]
    assert distances == arms[1].rows[0]["distance_by_iteration"]


def test_a_long_episode_shows_its_first_and_last_states():
    rows, summary = make_study({"float": ("0", 1)})
    rows[0] |= {"states": rows[0]["states"] * 7, "distance_by_iteration": list(range(49))}
    arms = arms_of(rows, summary, {})
    stills = strips(arms, choose_episode(arms), TASK)[0].stills
    assert len(stills) == MOST_FRAMES
    assert (stills[0].iteration, stills[-1].iteration) == (0, 48)


def test_states_that_are_not_finite_are_left_blank():
    rows, summary = make_study({"float": ("1", 1), "w2": ("0", 1)})
    broken = rows[1]
    broken["states"][2:] = [[float("nan"), 1.0]] * 5
    broken["distance_by_iteration"][2:] = [float("nan")] * 5
    broken |= {"final_distance": float("nan"), "failure": "non_finite: latent of frame 2"}
    page = render(rows, summary, {}, {}, TASK)
    assert page.count('class="blank"') == 5
    assert not re.search(r"\bnan\b", Document(page).text.lower())
    assert Document(page).line("w2", table=2)[1:4] == [
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

    rows, summary = make_study({"float": ("1", 1), "w2": ("0", 1)})
    assert len(render(rows, summary, {}, {}, Noise())) < 1_500_000


def test_failures_are_counted_by_arm_and_reason():
    rows, summary = make_study({"float": ("1111", 1), "w2": ("0001", 1)})
    rows[5]["failure"] = "non_finite: cost"
    table = Document(render(rows, summary, {}, {}, TASK)).tables[2]
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
    arms = {"full": ("11", 9), "again": ("11", 9), "cheat": ("11", None), "small": ("01", 3)}
    rows, summary = make_study(arms)
    kinds = {"full": "float", "again": "float", "cheat": "oracle-state", "small": "quantized"}
    config = {"arms": [{"name": name, "kind": kind} for name, kind in kinds.items()]}
    shown = [(arm.name, arm.role) for arm in arms_of(rows, summary, config)]
    assert shown == [
        ("full", "float"),
        ("again", "quantized"),
        ("small", "quantized"),
        ("cheat", "oracle"),
    ]


def test_arms_that_did_not_run_are_named():
    rows, summary = make_study({"float": ("00", 1)})
    page = render(rows, summary, make_config(["float", "w4", "w2"]), {}, TASK)
    assert "Not run: w4, w2." in Document(page).text


def test_a_summary_of_other_rows_is_refused():
    rows, summary = make_study({"float": ("11", 1), "w4": ("10", 1)})
    with pytest.raises(MismatchError, match=r"'w4': the summary says success 0\.9.*say 0\.5"):
        render(rows, [summary[0], summary[1] | {"success": 0.9}], {}, {}, TASK)
    with pytest.raises(MismatchError, match="'w4', which the summary lacks"):
        render(rows, summary[:1], {}, {}, TASK)
    with pytest.raises(UsageError, match="no arm"):
        render([], [], {}, {}, TASK)


def make_folder(path, arms):
    rows, summary = make_study(arms)
    folder = ResultsFolder(path)
    record = {"model_hash": "ab12", "cells": {"w4": "cd"}, "environment": ENVIRONMENT}
    folder.write_config(make_config(arms) | {"record": record})
    folder.write_episodes(rows)
    folder.write_summary(summary, COLUMNS)
    return rows, summary


def test_a_results_folder_gives_the_same_page_as_its_rows(tmp_path):
    arms = {"oracle-state": ("11", None), "float": ("11", 10), "w4": ("10", 5)}
    rows, summary = make_folder(tmp_path, arms)
    written = write_report(tmp_path)
    assert written == tmp_path / "report.html"
    environment = ENVIRONMENT | {"model_hash": "ab12"}
    expected = render(rows, summary, make_config(arms), environment, TASK)
    assert written.read_text(encoding="utf-8") == expected


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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_opens_the_page_without_errors(tmp_path, page):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        ["chromium", *options, f"--user-data-dir={tmp_path}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    assert done.stdout.count("<svg") == page.count("<svg")
