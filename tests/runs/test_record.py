"""Files that a run leaves."""

import json
import math

from offrl.runs.record import write_json


def test_what_json_cannot_write_becomes_null(tmp_path):
    found = {"a": [1.5, math.nan], "b": {"c": (math.inf, -math.inf, "nan", None, True, 3)}}
    write_json(tmp_path / "found.json", found)
    text = (tmp_path / "found.json").read_text()
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": [None, None, "nan", None, True, 3]}}
    assert "NaN" not in text
    assert "Infinity" not in text
