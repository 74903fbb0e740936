import dagster as dg

from sbp_assets.dagster_support.check_results import SHOWN, check_result


def test_a_failed_check_says_why_in_words() -> None:
    problems = [f"row {number} has <no> text" for number in range(SHOWN + 2)]
    failed = check_result(passed=False, metadata={"rows": 9, "problems": problems, "ids": ["a", "b"], "none": []})
    lines = (failed.description or "").splitlines()
    assert lines[0] == "- row 0 has &lt;no&gt; text" and lines[SHOWN:] == ["- and 2 more", "- ids: a, b"]
    assert failed.severity is dg.AssetCheckSeverity.ERROR and failed.metadata["rows"].value == 9
    assert check_result(passed=True, metadata={"problems": [], "first": ["a"]}).description is None
