"""The bars and the picture follow from the results."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from benchmarks.bars import BARS, judge
from benchmarks.measure import Run
from benchmarks.picture import BAR_LEFT, BAR_RIGHT, draw
from benchmarks.report import bar_table, probe_sections
from benchmarks.results import Result

SVG = "{http://www.w3.org/2000/svg}"


def rates(scenario: str, peer: str, *numbers: float) -> list[Result]:
    return [
        Result(number, scenario, peer, Run(accepted=rate, processed=rate * 2, seconds=1.0))
        for number, rate in enumerate(numbers, 1)
    ]


def test_a_bar_is_judged_by_the_median_of_the_rounds() -> None:
    results = [
        *rates("http-1000", "ingestd", 900_000, 1_200_000, 2_000_000),
        *rates("http-1000", "fastapi", 200_000, 250_000, 410_000),
        *rates("http-100", "ingestd", 600_000, 800_000, 650_000),
        Result(1, "latency-100", "ingestd", None, figures={"p99": 10.1}),
        Result(1, "memory", "ingestd", None, figures={"load_daemon": 250.0}),
        Result(2, "memory", "ingestd", None, "did not start"),
        Result(1, "journal", "ingestd", None, figures={"share": 0.499}),
    ]
    verdicts = {verdict.bar: verdict for verdict in judge(results)}
    assert len(verdicts) == len(BARS)
    measured = {bar: verdict.met for bar, verdict in verdicts.items() if verdict.met is not None}
    assert measured == {
        "bodies of 1,000, durable, decoded in a process worker": True,
        "bodies of 1,000 ÷ fastapi": False,  # 4.5, 4.8 and 4.9 times
        "bodies of 100": False,
        "p99 of the 202 at half of the highest rate, bodies of 100": False,
        "full load, the daemon's highest RSS": True,
        "journal ÷ plain append and fdatasync, chunks of 1 MB": False,
    }
    table = bar_table(list(verdicts.values()))
    assert "| 4.8 (4.5 to 4.9) | **no** |" in " ".join(table.split())
    assert "≥ 1,200,000 records/s" in table
    assert table.count("not measured") == len(BARS) - len(measured)


def test_a_probe_has_a_table_of_its_own() -> None:
    results = [
        Result(number, "start", peer, None, figures={"ready": seconds})
        for number, peer, seconds in ((1, "ingestd", 0.4), (2, "ingestd", 0.5), (1, "loop", 0.2))
    ]
    results.append(Result(2, "start", "loop", None, "not ready"))
    (section,) = probe_sections(results)
    assert "exec to ready (s)" in section
    lines = [" ".join(line.split()) for line in section.splitlines()]
    assert "| ingestd | 0.45 (0.40 to 0.50) |" in lines
    assert "| loop | 0.20 |" in lines


def test_the_picture_has_a_bar_a_number_and_a_ratio_for_each_peer() -> None:
    results = [
        *rates("http-1", "ingestd", 10_000, 12_000),
        *rates("http-1", "<fast & loose>", 40_000, 20_000),
        *rates("http-1", "slow", 1_000, 1_000),
        Result(1, "http-100", "ingestd", None, "did not start"),
    ]
    root = ET.fromstring(draw(results, ["ingestd"], "a machine & more"))
    bars = [one for one in root.iter(f"{SVG}rect") if float(one.attrib["x"]) == BAR_LEFT]
    assert [bar.attrib["class"] for bar in bars] == ["disk", "memory", "memory"]
    widths = [float(bar.attrib["width"]) for bar in bars]
    scale = (BAR_RIGHT - BAR_LEFT) / 40_000  # the longest whisker fills the panel
    assert [round(width / scale / 1000) for width in widths] == [11, 30, 1]
    words = [one.text for one in root.iter(f"{SVG}text")]
    for word in ("11,000", "30,000", "1,000", "<fast & loose>", "a machine & more"):
        assert word in words
    assert "0.42 \N{MULTIPLICATION SIGN}" in words  # of 0.25 and 0.6
    assert "11.0 \N{MULTIPLICATION SIGN}" in words
    assert "HTTP, 100 records a request" not in words  # nothing to draw
    # Two rounds that differ have a whisker, two that do not have none; one is the legend's.
    assert sum(one.attrib["class"] == "whisker" for one in root.iter(f"{SVG}path")) == 3
    assert all(
        float(one.attrib["y"]) < float(root.attrib["height"]) for one in root.iter(f"{SVG}text")
    )
