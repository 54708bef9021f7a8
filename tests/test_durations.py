"""What the comparison of durations tells."""

from __future__ import annotations

import durations

REPORT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="one" time="1.25"/>
<testcase classname="tests.test_a" name="two[x]" time="2.0"><skipped/></testcase>
<testcase classname="tests.ops.test_b" name="one" time="{b}"/>
<testcase classname="" name="tests.gpu.test_c" time="0.0"><skipped/></testcase>
</testsuite></testsuites>"""


def test_seconds_of_a_file_are_the_sum_over_its_tests_and_reports(tmp_path):
    reports = []
    for number, seconds in enumerate((4.0, 1.5)):
        reports.append(tmp_path / f"{number}.xml")
        reports[-1].write_text(REPORT.format(b=seconds))
    assert durations.read_reports(reports) == {
        "tests.gpu.test_c": 0.0,
        "tests.ops.test_b": 5.5,
        "tests.test_a": 6.5,
    }


def test_changes_beyond_noise_are_told_and_the_largest_comes_first():
    before = {"same": 100.0, "noisy": 100.0, "short": 1.0, "slower": 20.0, "gone": 9.0}
    after = {"same": 100.0, "noisy": 120.0, "short": 3.0, "slower": 26.0, "new": 50.0}
    lines = durations.changes(before, after)
    assert [line.split()[-1] for line in lines] == ["new", "gone", "slower"]
    assert lines[1].split()[:2] == ["-9.0", "s"]
    assert lines[2].split() == ["+6.0", "s", "20.0", "->", "26.0", "slower"]
