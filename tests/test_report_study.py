"""The report of a whole study: two tasks of about 50 arms, and what a browser makes of it."""

import csv
import io
import re

import pytest

from quantwm.envs.wall import Wall
from quantwm.errors import CorruptFileError, UsageError
from quantwm.report import render, task_report, write_report
from quantwm.report.filmstrip import choose_scenes
from quantwm.report.layouts import group_of, panels_of, shown_iterations
from quantwm.report.series import MOST_SERIES, spread, styles_of
from quantwm.study.findings import Evidence, Finding
from quantwm.study.rows import read_parquet, write_parquet
from quantwm.study.spec import load_preset
from report_support import (
    ENVIRONMENT,
    TASK,
    Document,
    browse,
    fidelity,
    make_config,
    make_rows,
    make_study,
    make_summary,
    needs_browser,
    one_task,
    sensitivity,
    whole_study,
    write_folder,
)


class Elsewhere(Wall):
    """Wall under PushT's name: what the report needs of a second task."""

    name = "pusht"


def finding(number, task, verdict="supported", *, n=24, statement=None, needed=None, missing=()):
    clause = Evidence(f"w{number} minus float", -0.25, -0.5, -0.125, 0.1, n, verdict, "a note")
    text = statement or f"Statement {number}"
    return Finding(number, text, task, verdict, (clause,), needed, tuple(missing))


FINDINGS = [
    finding(2, "wall", "contradicted"),
    finding(2, "pusht", "undecided", needed=96),
    finding(1, "wall", n=0, missing=["w8", "w8a8"]),
    finding(1, "pusht", n=0, missing=["w8"]),
    finding(6, None),
]


@pytest.fixture(scope="module")
def tasks():
    rows, summary, config = whole_study()
    diagnoses = [fidelity(f"w{bits}", bits / 10) for bits in (8, 4, 3)]
    diagnoses += [fidelity("w4@gptq", 0.9), sensitivity(), {"arm": "w2", "error": "costs are NaN"}]
    wall = task_report(rows, summary, config, ENVIRONMENT, TASK, diagnoses=diagnoses)
    rows, summary, config = whole_study(task="pusht")
    config = config | {"task": {"name": "pusht"}}
    return [wall, task_report(rows, summary, config, ENVIRONMENT, Elsewhere())]


@pytest.fixture(scope="module")
def report(tasks):
    return render(tasks, FINDINGS, command="quantwm study wall --preset full")


@pytest.fixture(scope="module")
def document(report):
    return Document(report.html)


def read(report, name):
    return list(csv.DictReader(io.StringIO(report.tables[f"report-tables/{name}.csv"])))


def test_every_link_leads_somewhere_and_every_id_is_unique(report, document):
    ids = document.values("id")
    assert len(ids) == len(set(ids))
    links = [link for link in document.values("href") if link != "data:,"]
    inside = [link.removeprefix("#") for link in links if link.startswith("#")]
    assert set(inside) <= set(ids)
    assert {"findings", "task-wall", "wall-weights", "pusht-sides", "wall-sensitivity"} <= set(
        inside
    )
    beside = [link for link in links if not link.startswith("#")]
    assert sorted(beside) == sorted(report.tables)
    assert len(document.tables) == len(report.tables)


def test_nothing_is_loaded_and_only_the_filter_s_script_may_run(report, document):
    policy = next(a["content"] for tag, a in document.tags if "content" in a and "src" in str(a))
    assert policy.startswith("default-src 'none'")
    assert re.search(r"script-src 'sha256-[\w+/]+=*'$", policy)
    assert sum(tag == "script" for tag, _ in document.tags) == 1
    assert "http" not in report.html.replace("http-equiv", "")
    assert not [key for _, attributes in document.tags for key in attributes if key[:2] == "on"]
    assert len(report.html) < 3_000_000


def test_the_findings_come_first_and_name_what_they_rest_on(document):
    first, rest = document.text.split("Statement 2", 1)
    assert "In short float reaches" not in first
    assert "In short float reaches" in rest
    assert "✗ contradicted Wall: w2 minus float −0.25 [−0.50, −0.12]" in document.text
    assert "96 episodes an arm would decide it" in document.text
    assert "Not tested by these arms: finding 1 " in document.text
    assert "✓ supported All tasks" in document.text


def test_the_findings_table_holds_every_comparison(report):
    lines = read(report, "findings")
    assert [(line["finding"], line["task"]) for line in lines] == [
        ("2", "wall"),
        ("2", "pusht"),
        ("6", "all"),
    ]
    assert lines[1]["episodes_needed"] == "96"
    assert (lines[0]["estimate"], lines[0]["margin"]) == ("-0.25", "0.1")


def test_claims_stand_beside_their_tables_with_this_study_s_verdict(report):
    section = report.html.split('<section id="wall-weights"')[1].split("<section")[0]
    assert "arXiv 2602.02110" in section
    assert '<a href="#finding-2">finding 2</a> contradicted' in section
    assert "finding 1" not in section


def test_a_table_holds_success_after_every_iteration_of_the_rows(tasks, report):
    lines = {line["arm"]: line for line in read(report, "wall-weights")}
    (arm,) = [arm for arm in tasks[0].arms if arm.name == "w3g128@gptq"]
    for k in range(7):
        reached = [row["success_by_iteration"][k] for row in arm.rows]
        assert float(lines[arm.name][f"after_{k}"]) == pytest.approx(sum(reached) / len(reached))
    assert lines[arm.name]["method"] == "gptq"
    assert (lines[arm.name]["weight_bits"], lines[arm.name]["weights"]) == ("3", "g128")
    assert float(lines[arm.name]["difference"]) == arm.difference.difference
    assert next(iter(lines)) == "float"


def test_every_arm_is_in_the_table_of_its_own_group(tasks, report):
    expected = {
        "weights": {"w8", "w2", "w4@awq", "w3g128"},
        "activations": {"w8a8", "w4a4-token", "w4a4@percentile"},
        "sides": {"encoder:w3", "predictor:w3", "w3"},
        "blocks": {"encoder.blocks.0:w3"},
        "budgets": {"w3", "w3/steps=20", "w3/mpc_iterations=12"},
        "bounds": {"oracle-state", "oracle-latent:w3"},
    }
    seen = set()
    for group, names in expected.items():
        own = {line["arm"] for line in read(report, f"wall-{group}")}
        assert names <= own
        seen |= own
    assert seen == {arm.name for arm in tasks[0].arms}
    assert {line["arm"] for line in read(report, "wall-arms")} == seen


def test_a_side_stands_beside_the_other_and_both():
    names = ["float", "predictor:w3", "encoder:w3", "w3", "w4", "encoder:w2"]
    arms = one_task(dict.fromkeys(names, ("10", 1))).arms
    panels = panels_of("sides", arms)
    shown = {panel.title: [(what, arm.name) for what, arm in panel.members] for panel in panels}
    assert shown == {
        "W3, rtn": [
            ("both", "w3"),
            ("encoder only", "encoder:w3"),
            ("predictor only", "predictor:w3"),
        ],
        "W2, rtn": [("encoder only", "encoder:w2")],
    }
    assert [group_of(arm) for arm in arms][:3] == ["", "sides", "sides"]
    names = ["float", "w3-w_study", "w3", "encoder:w3", "encoder:w3-w_study"]
    (panel,) = panels_of("sides", one_task(dict.fromkeys(names, ("10", 1))).arms)
    assert {arm.name for _, arm in panel.members} == set(names[1:])
    (panel,) = panels_of("sides", one_task(dict.fromkeys(names[:4], ("10", 1))).arms)
    assert {arm.name for _, arm in panel.members} == {"w3", "encoder:w3"}


@pytest.mark.parametrize(
    ("ends", "shown"),
    [
        ({4}, [0, 1, 2, 3, 4]),
        ({12}, [0, 2, 4, 6, 8, 10, 12]),
        ({50}, [0, 10, 20, 30, 40, 50]),
        ({6, 24}, [0, 5, 6, 10, 15, 20, 24]),
    ],
)
def test_long_episodes_are_shown_every_few_iterations_and_where_an_arm_ends(ends, shown):
    assert shown_iterations(ends) == shown


def test_tasks_stand_side_by_side(tasks, report):
    lines = {line["arm"]: line for line in read(report, "tasks")}
    for task in tasks:
        for arm in task.arms:
            assert float(lines[arm.name][f"{task.key}_success"]) == arm.success
            assert lines[arm.name][f"{task.key}_verdict"] == arm.verdict


def test_what_the_filter_goes_by_is_on_rows_figures_and_lines(document):
    marked = [attributes for _, attributes in document.tags if "data-method" in attributes]
    assert {"tr", "g", "div"} <= {tag for tag, a in document.tags if "data-method" in a}
    offered = {a["value"] for tag, a in document.tags if tag == "input" and a["name"] == "method"}
    assert {a["data-method"] for a in marked} == offered
    widths = [a["value"] for tag, a in document.tags if tag == "input" and a["name"] == "width"]
    assert widths == ["W8", "W4", "W3", "W2", "W8A8", "W4A4"]
    references = [line for line in document.lines if line.get("data-arm", "").endswith(" float")]
    assert references
    assert not any("data-method" in line for line in references)


def test_no_panel_has_more_lines_than_can_be_told_apart(tasks):
    looks = styles_of([f"method {number}" for number in range(18)])
    assert len(set(looks.values())) == 18
    names = [f"again-{number}" for number in range(MOST_SERIES + 4)]
    arms = {"float": ("11", 9)} | dict.fromkeys(names, ("10", 5))
    rows, summary = make_study(arms)
    page = render([task_report(rows, summary, make_config(arms), {}, TASK)]).html
    panels = re.findall(r'aria-label="Success by MPC iteration, W4: (.*?)\.\"', page)
    assert [panel.count(";") for panel in panels] == [7, 6]


def test_labels_are_moved_apart_and_keep_their_order():
    placed = spread([100.0, 99.0, 2.0, 1.0, 0.0], gap=10, most=100)
    assert placed == [100, 90, 20, 10, 0]
    assert spread([50.0, 20.0], gap=10, most=100) == [50, 20]


def test_diagnoses_are_shown_where_there_are_some(report, document):
    assert "pusht-sensitivity" not in report.html
    described = " ".join(document.values("aria-label"))
    assert "Sensitivity of the encoder's layers. encoder.blocks.0.attn.qkv 0.9;" in described
    assert "by w4@gptq: rank correlation 0.90." in described
    assert "w2: costs are NaN" in document.text
    (first, *_) = read(report, "wall-sensitivity-0")
    assert (first["layer"], float(first["error"])) == ("encoder.blocks.0.mlp.fc2", 1.2)
    assert read(report, "wall-fidelity")[0]["against_truth_visual"] == "0.25"


def test_of_many_diagnosed_arms_some_are_drawn_and_all_are_listed():
    names = [f"w{bits}{group}" for bits in range(2, 9) for group in ("", "g64")]
    arms = {"float": ("11", 9)} | dict.fromkeys(names, ("10", 5))
    diagnoses = [fidelity(name, rank / 20) for rank, name in enumerate(names)]
    report = render([one_task(arms, diagnoses=diagnoses)])
    drawn = re.findall(r"float model and by (\S+): rank correlation", report.html)
    assert (len(drawn), drawn[0], drawn[-1]) == (12, names[0], names[-1])
    assert {line["arm"] for line in read(report, "wall-fidelity")} == set(names)


def test_the_objective_is_measured_against_the_float_model(tasks, report):
    lines = {line["arm"]: line for line in read(report, "wall-objective")}
    assert float(lines["float"]["cost_last_plan"]) == 1
    assert float(lines["w2"]["cost_last_plan"]) > 1
    assert float(lines["w3"]["fall_within_plan"]) == pytest.approx(1 / 3)
    rows = read(report, "wall-objective-iterations")
    assert [row["what"] for row in rows[:3]] == ["predicted cost", "AUC", "success"]


def test_a_strip_shows_each_cause_of_failure_once():
    arms = {"float": ("1111", 1), "w3": ("1110", 1), "w2": ("0000", 1), "w4": ("0111", 1)}
    task = one_task(arms)
    by_name = {arm.name: arm for arm in task.arms}
    by_name["w4"].rows[0]["failure"] = "non_finite: latent"
    scenes, choice = choose_scenes(task.arms, {"w3": "the encoder's bits break it"})
    shown = [(scene.arm.name, scene.row["episode"], scene.remark) for scene in scenes]
    assert shown == [
        ("float", 0, ""),
        ("w2", 0, ""),
        ("w3", 3, "Episode 3: the encoder's bits break it."),
        ("w4", 0, "Episode 0: non_finite."),
    ]
    assert "that float solves and w2 fails" in choice


def test_a_small_study_has_no_filter_and_no_empty_sections():
    page = render([one_task({"float": ("11", 9), "w4": ("10", 3)})], [finding(1, "wall", n=0)]).html
    assert "<script" not in page
    assert "Not tested by these arms: finding 1" in page
    for absent in ("Layer sensitivity", "Cost fidelity", 'class="contents"'):
        assert absent not in page


def test_a_small_study_has_its_objective_and_the_published_claims():
    arms = {"float": ("1110", 9), "w4": ("1010", 3), "w8a8": ("1100", 5)}
    report = render([one_task(arms)], FINDINGS)
    lines = {line["arm"]: line for line in read(report, "wall-objective")}
    assert set(lines) == set(arms)
    assert float(lines["float"]["cost_last_plan"]) == 1
    told = report.html.split('<section id="wall-arms"')[1].split("<section")[0]
    assert told.count("Published study") == 2
    assert '<a href="#finding-2">finding 2</a> contradicted' in told
    failed = report.html.split('<section id="wall-failures"')[1]
    assert '<a href="#finding-6">finding 6</a> supported' in failed
    assert "wall-objective" not in render([one_task(arms)], brief=True).html
    page = render([one_task({"w4": ("11", 3)})]).html
    assert "wall-objective" not in page
    assert page.count("Published study") == 1


@pytest.mark.parametrize("name", ['<b data-method="x">', 'a" onload="x', "$x$ 模型 & co"])
def test_text_of_findings_and_diagnoses_is_escaped(name):
    arms = {"float": ("11", 10), name: ("00", 5)}
    layer = {"layer": name, "part": name, "block": "", "error": 0.5, "rank_correlation": 0.5}
    layers = {"kind": "sensitivity", "scheme": name, "method": name, "layers": [layer]}
    task = one_task(arms, diagnoses=[fidelity(name), layers])
    findings = [finding(1, name, statement=name, missing=[name]), finding(2, name, n=0)]
    document = Document(render([task], findings).html)
    marks = [attributes for _, attributes in document.tags if "data-method" in attributes]
    assert {attributes["data-method"] for attributes in marks} == {"rtn"}
    assert not [a for _, a in document.tags if "onload" in a]
    assert document.text.count(name) >= 10


def test_several_folders_make_one_report(tmp_path):
    folders = []
    for study, solved in (("first", "10"), ("second", "11"), ("second", "00")):
        arms = {"float": ("11", 10), "w4": (solved, 5)}
        rows, summary = make_study(arms)
        folder = tmp_path / f"folder-{len(folders)}"
        config = make_config(arms) | {"name": study}
        folders.append(write_folder(folder, rows, summary, config, [fidelity("w4")]))
    with pytest.raises(UsageError, match="give the folder to write it to as out"):
        write_report(folders)
    with pytest.raises(UsageError, match="at least one results folder"):
        write_report([], out=tmp_path)
    written = write_report(folders, out=tmp_path / "whole")
    assert written == tmp_path / "whole" / "report.html"
    document = Document(written.read_text(encoding="utf-8"))
    for title in ("Wall, first", "Wall, second", "Wall, second (2)"):
        assert title in document.text
    links = [link for link in document.values("href") if link.startswith("report-tables/")]
    assert "report-tables/wall-second-2-fidelity.csv" in links
    assert all((written.parent / link).is_file() for link in links)


def test_a_damaged_diagnosis_is_named(tmp_path):
    arms = {"float": ("11", 10)}
    rows, summary = make_study(arms)
    write_folder(tmp_path, rows, summary, make_config(arms), [sensitivity()])
    (tmp_path / "diagnostics" / "sensitivity-sensitivity.json").write_text("[")
    with pytest.raises(CorruptFileError, match=r"sensitivity-sensitivity\.json"):
        write_report(tmp_path)


# What a browser makes of it.


@pytest.fixture(scope="module")
def opened(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(report.html, encoding="utf-8")
    return folder


def shown_rows(dom):
    """The visible table rows' (method, width), of the task's sections that are visible."""
    rows = [line for line in Document(dom).lines if "data-method" in line and "data-arm" in line]
    return {
        (line["data-arm"].split()[0], line["data-method"], line["data-width"])
        for line in rows
        if "hidden" not in line
    }


@needs_browser
def test_the_filter_shows_everything_at_first(opened, tasks):
    dom = browse((opened / "report.html").as_uri(), opened / "profile")
    assert len({method for _, method, _ in shown_rows(dom)}) > 5
    assert f"all {sum(len(task.arms) for task in tasks)} arms" in re.sub("<[^>]*>", "", dom)


@needs_browser
@pytest.mark.parametrize(
    ("address", "counted", "evidence"),
    [
        ("", "all 6 arms", {"wall", "pusht"}),
        ("#task=wall", "3 of 6 arms", {"wall"}),
        ("#task=pusht&method=gptq", "2 of 6 arms", {"pusht"}),
    ],
)
def test_the_filter_counts_the_arms_of_small_studies(tmp_path, address, counted, evidence):
    arms = {"float": ("11", 9), "w4": ("10", 3), "w4@gptq": ("11", 3)}
    rows, summary = make_study(arms)
    config = make_config(arms, task="pusht") | {"task": {"name": "pusht"}}
    tasks = [one_task(arms), task_report(rows, summary, config, ENVIRONMENT, Elsewhere())]
    (tmp_path / "page.html").write_text(render(tasks, FINDINGS).html, encoding="utf-8")
    dom = browse((tmp_path / "page.html").as_uri() + address, tmp_path / "profile")
    assert f"Filter: {counted}" in re.sub("<[^>]*>", "", dom)
    lines = [line for line in Document(dom).lines if "data-task" in line]
    assert {line["data-task"] for line in lines if "hidden" not in line} == evidence


@needs_browser
def test_the_filter_hides_what_the_address_leaves_out(opened):
    address = (opened / "report.html").as_uri() + "#task=wall&method=gptq,rotation&width=W3"
    dom = browse(address, opened / "profile")
    assert {(method, width) for task, method, width in shown_rows(dom) if task == "wall"} == {
        ("gptq", "W3"),
        ("rotation", "W3"),
    }
    tags = Document(dom).tags
    hidden = {a["id"]: "hidden" in a for _, a in tags if "id" in a}
    assert hidden["task-pusht"]
    assert hidden["wall-activations"]
    assert not hidden["task-wall"]
    assert not hidden["wall-weights"]
    checked = [a for tag, a in tags if tag == "form"]
    assert "hidden" not in checked[0]


@needs_browser
@pytest.mark.parametrize("address", ["#wall-sides", "#method=nothing", "#method=%E0%A4%A"])
def test_other_addresses_hide_nothing(opened, address):
    dom = browse((opened / "report.html").as_uri() + address, opened / "profile")
    assert not any("hidden" in line for line in Document(dom).lines)


@needs_browser
@pytest.mark.parametrize("size", ["390,844", "1280,900"])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_follows_the_colour_scheme(opened, report, size, dark):
    probe = (
        "<script>const d = document.documentElement.dataset;"
        "for (const one of document.querySelectorAll('details')) one.open = true;"
        "d.over = document.documentElement.scrollWidth - innerWidth;"
        "d.paper = getComputedStyle(document.body).backgroundColor</script></body>"
    )
    free = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.html)
    (opened / "probe.html").write_text(free.replace("</body>", probe), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    options = [f"--window-size={size}", scheme]
    dom = browse((opened / "probe.html").as_uri(), opened / "profile", *options)
    seen = next(a for tag, a in Document(dom).tags if tag == "html")
    assert int(seen["data-over"]) <= 0
    assert seen["data-paper"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def packed(tmp_path, name="rows.parquet", arms=("float", "w8", "w4")):
    rows = [row for arm in arms for row in make_rows(arm, "1110" * 4)]
    write_parquet(tmp_path / name, rows)
    return tmp_path / name


def test_rows_alone_make_the_report_that_their_folder_makes(tmp_path):
    arms = ("float", "w8", "w4")
    file = packed(tmp_path, arms=arms)
    written = write_report(file, out=tmp_path / "page.html")
    assert written == tmp_path / "page.html"
    rows = {arm: [row for row in read_parquet(file) if row["arm"] == arm] for arm in arms}
    summary = make_summary(rows, dict.fromkeys(arms, 1000))
    config = load_preset("findings", "wall").with_overrides(["episodes=16"]).to_dict()
    of_folder = task_report(
        [row for own in rows.values() for row in own], summary, config, {}, TASK
    )
    tables = render([of_folder]).tables
    name = "report-tables/wall-arms.csv"
    lines = [
        list(csv.DictReader(io.StringIO(text)))
        for text in (tables[name], (tmp_path / name).read_text())
    ]
    for expected, found in zip(*lines, strict=True):
        planning = sum(row["plan_seconds"] for row in rows[found["arm"]])
        assert found == expected | {"bytes": "", "seconds": str(planning)}
    assert f"quantwm report {file} --out report" in written.read_text()


def test_rows_of_arms_that_the_preset_lacks_and_rows_without_a_place_are_refused(tmp_path):
    file = packed(tmp_path)
    with pytest.raises(UsageError, match="give the folder"):
        write_report(file)
    other = packed(tmp_path, "other.parquet", ("float", "w4@gptq"))
    with pytest.raises(UsageError, match=r"'w4@gptq', which the preset 'findings' lacks"):
        write_report(other, out=tmp_path)
    assert write_report(other, out=tmp_path, preset="methods").is_file()


def test_a_brief_report_is_a_small_page_alone(tmp_path, tasks):
    whole, brief = render(tasks, FINDINGS), render(tasks, FINDINGS, brief=True)
    assert len(brief.html) < 0.6 * len(whole.html)
    assert not brief.tables
    ids = set(Document(brief.html).values("id"))
    assert {"findings", "tasks", "wall-weights", "wall-sides", "wall-frames"} <= ids
    assert not ids & {"wall-episodes", "wall-failures", "wall-setup", "wall-objective"}
    assert "report-tables" not in brief.html
    assert brief.html.count('<ol class="strip"') == 2 * len(tasks)


def test_plots_repeat_no_style_and_no_digits_that_nobody_sees(report):
    plots = re.findall(r"<svg.*?</svg>", report.html, re.S)
    drawn = re.findall(r' (?:d|x|y|transform)="([^"]*)"', "".join(plots))
    assert drawn
    assert not re.search(r"\d\.\d{3}", " ".join(drawn))
    assert not re.search(r"<g>|\n", "".join(plots))
    styles = re.findall(r'<(?:path|text|use|g)\b[^>]* style="([^"]*)"', "".join(plots))
    assert max(map(styles.count, styles), default=0) <= 2
    rules = dict(re.findall(r"^\.(s\d+) \{(.*)\}$", report.html, re.M))
    assert set(re.findall(r'class="(s\d+)"', report.html)) == set(rules)
