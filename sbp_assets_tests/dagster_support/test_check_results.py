import dagster as dg

from sbp_assets.dagster_support.check_results import LISTED, SHOWN, check_result, problems_result


def test_a_failed_check_says_why_in_words() -> None:
    problems = [f"row {number} has <no> text" for number in range(SHOWN + 2)]
    failed = check_result(passed=False, metadata={"rows": 9, "problems": problems, "ids": ["a", "b"], "none": []})
    lines = (failed.description or "").splitlines()
    assert lines[0] == "- row 0 has &lt;no&gt; text" and lines[SHOWN:] == ["- and 2 more", "- ids: a, b"]
    assert failed.severity is dg.AssetCheckSeverity.ERROR and failed.metadata["rows"].value == 9
    assert check_result(passed=True, metadata={"problems": [], "first": ["a"]}).description is None


def test_a_check_of_problems_passes_without_any_and_lists_the_first() -> None:
    ids = [f"document\x1b{number}" for number in range(LISTED + 1)]
    failed = problems_result(ids, dg.AssetCheckSeverity.WARN, documents=99)
    assert not failed.passed and failed.severity is dg.AssetCheckSeverity.WARN
    assert failed.metadata["problem_count"].value == LISTED + 1 and failed.metadata["documents"].value == 99
    # What a document is called reaches neither a terminal nor the UI as it is.
    assert failed.metadata["problems"].value == [f"document {number}" for number in range(LISTED)]
    assert (failed.description or "").splitlines()[-1] == f"- and {len(ids) - SHOWN} more"
    passed = problems_result([], documents=99)
    assert passed.passed and passed.description is None and passed.metadata["problem_count"].value == 0
