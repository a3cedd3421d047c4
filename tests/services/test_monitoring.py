"""Alerts and the dashboard name what the API exports, and every alert leads to a chapter that exists."""

import json
import re
from pathlib import Path
from typing import Any

import httpx2
import yaml

from tests.services.running import ROOT
from tests.services.small import Small

FOLDER = ROOT / "deploy" / "monitoring"
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "rules.yaml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text(encoding="utf-8"))
EXPRESSIONS = [
    *(rule["expr"] for rule in RULES),
    *(target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]),
]
NAME = re.compile(r"espalier_[a-z_]+")


def test_everything_asked_for_is_exported_and_everything_exported_is_asked_for(tmp_path: Path) -> None:
    small = Small(tmp_path)
    with small.serving(), httpx2.Client(base_url=small.url) as client:
        client.get("/v1/jobs")
        lines = client.get("/metrics").text.splitlines()
    exported = {line.split()[2] for line in lines if line.startswith("# TYPE espalier_")}
    series = {found[0] for line in lines if (found := NAME.match(line))}
    asked = {name for expression in EXPRESSIONS for name in NAME.findall(expression)}
    assert asked <= series
    plain = {re.sub(r"_(total|bucket|created)$", "", name) for name in asked}
    assert {re.sub(r"_(total|created)$", "", name) for name in exported} == plain


def test_labels_in_expressions_are_exported(tmp_path: Path) -> None:
    small = Small(tmp_path)
    with small.serving(), httpx2.Client(base_url=small.url) as client:
        client.get("/v1/jobs")
        text = client.get("/metrics").text
    for expression in EXPRESSIONS:
        for name, inside in re.findall(r"(espalier_[a-z_]+)\{([^}]*)\}", expression):
            for label in re.findall(r"(\w+)[!=]?[=~]", inside):
                assert re.search(rf"^{name}\{{[^}}]*{label}=", text, re.MULTILINE), (name, label)


def test_every_alert_leads_to_a_chapter() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    for rule in RULES:
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (page, anchor in anchors) == ("docs/operations.md", True), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_panels_do_not_overlap_and_have_one_datasource() -> None:
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        taken = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + 8)}
        assert not taken & cells
        cells |= taken
        assert panel["datasource"]["uid"] == "${source}"
