"""Docstrings, help texts and problem titles say what a thing is, in the words of the field."""

from __future__ import annotations

import ast
import json
import re
from typing import TYPE_CHECKING

import pytest
import yaml

from ingestd.__main__ import COMMANDS, TOOLS
from ingestd.base.metrics import Metrics
from ingestd.config.keys import settings_of
from ingestd.http import problem
from ingestd.settings import Settings
from tests.structure import gates

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic import BaseModel

OPENING = re.compile(
    r"(what|who|whom|whose|whoever|whether|how|when|where|why|which)\b", re.IGNORECASE
)
"""A first word that makes the reader guess the thing that is described."""
PERSONS = re.compile(r"\b(who|whoever|whom|nobody|somebody|anybody|what comes)\b", re.IGNORECASE)
"""Words that stand for a thing with a name of its own, such as a client or an operator."""


def first_sentence(text: str) -> str:
    """The first sentence of a text, without line ends and what is quoted in it."""
    flat = re.sub(r"`[^`]*`|\"[^\"]*\"", "", " ".join(text.split()))
    return re.split(r"(?<=[.!?]) ", flat, maxsplit=1)[0]


def titles() -> Iterator[tuple[str, str]]:
    for name, value in vars(problem).items():
        if isinstance(value, problem.ProblemType):
            yield f"problem {name}", value.title


def descriptions(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The help text of every setting."""
    for path, field in settings_of(model):
        yield f"setting {'.'.join(path)}", field.description or ""


def texts() -> list[tuple[str, str]]:
    return [
        *gates.documented(gates.read()),
        *titles(),
        *descriptions(Settings),
        *help_texts(),
        *watched(),
    ]


def watched() -> Iterator[tuple[str, str]]:
    """The help of each metric, and the texts of the alerts and the dashboard that show them."""
    for metric in Metrics("1").collect():
        yield f"metric {metric.name}", metric.documentation
    folder = gates.ROOT / "deploy" / "monitoring"
    for group in yaml.safe_load((folder / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"alert {rule['alert']}", rule["annotations"]["summary"]
            yield f"alert {rule['alert']}", rule["annotations"]["description"]
    for panel in json.loads((folder / "dashboard.json").read_text())["panels"]:
        for each in (panel, *panel.get("panels", [])):
            yield f"panel {each['title']}", each.get("description", "")


def help_texts() -> Iterator[tuple[str, str]]:
    """`help=`, `description=`, `DESCRIPTION` and the tables of commands."""
    for name, text in {**COMMANDS, **TOOLS}.items():
        yield f"help {name}", text
    for name, module in gates.read().modules.items():
        if not name.startswith("ingestd.cli"):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.keyword) and node.arg in {"help", "description"}:
                value: ast.expr = node.value
            elif (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "DESCRIPTION"
            ):
                value = node.value
            else:
                continue
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield f"help {name}:{value.lineno}", value.value


@pytest.fixture(scope="module")
def all_texts() -> list[tuple[str, str]]:
    return texts()


def test_there_is_something_to_read(all_texts: list[tuple[str, str]]) -> None:
    kinds = {place.split(" ")[0] for place, _ in all_texts}
    assert {"problem", "setting", "help", "metric", "alert", "panel"} < kinds
    assert len(all_texts) > 1000


def test_the_first_word_names_the_thing(all_texts: list[tuple[str, str]]) -> None:
    wrong = [f"{place}: {text[:70]!r}" for place, text in all_texts if OPENING.match(text)]
    assert not wrong, "\n".join(wrong)


def test_the_first_sentence_names_persons_by_their_role(all_texts: list[tuple[str, str]]) -> None:
    wrong = [
        f"{place}: {text[:90]!r}"
        for place, text in all_texts
        if PERSONS.search(first_sentence(text))
    ]
    assert not wrong, "\n".join(wrong)


def test_an_invalid_record_is_called_one(all_texts: list[tuple[str, str]]) -> None:
    wrong = [f"{place}: {text!r}" for place, text in all_texts if "that were none" in text]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "is_wrong"),
    [("Whether it is ready.", True), ("Returns how many.", False), ("`what` of it.", False)],
)
def test_the_rule(text: str, is_wrong: bool) -> None:
    assert bool(OPENING.match(text)) == is_wrong
