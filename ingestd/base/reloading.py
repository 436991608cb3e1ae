"""What a reload changes, and what it can't. A decision: nothing is read here and nothing done."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ingestd.base.contradictions import contradictions
from ingestd.base.errors import ConfigError
from ingestd.base.keys import PIPELINES, dotted, values_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ingestd.base.settings import Settings

_HTTP = ("tls", "tokens", "webhooks", "allow_anonymous")
_SECTIONS = (("log", "level"), ("batch",), *(("http", key) for key in _HTTP))


class Change(NamedTuple):
    """What comes of new settings.

    Attributes:
        settings: those of the running daemon with everything that can change put in.
        changed: what is another value now, dotted keys.
        needs_restart: what is set to another value and stays as it was, dotted keys.
    """

    settings: Settings
    changed: list[str]
    needs_restart: list[str]


def plan(running: Settings, new: Settings) -> Change:
    """What a reload comes to.

    Args:
        running: the settings that are in effect.
        new: what is configured now.

    Raises:
        ConfigError: what can change does not go with what can't; one line for each problem.
    """
    changed: list[str] = []
    needs_restart: list[str] = []
    for path in _different(running, new):
        (changed if _can_change(path) else needs_restart).append(dotted(path))
    settings = _merge(running, new)
    problems = [
        f"{key}: {text}; what needs a restart is as it was"
        for key, text in contradictions(settings)
    ]
    if problems:
        raise ConfigError(problem="\n".join(problems))
    return Change(settings, changed, needs_restart)


def _different(running: Settings, new: Settings) -> Iterator[tuple[str, ...]]:
    before, after = dict(values_of(running)), dict(values_of(new))
    # A pipeline that came or went is one change, not one for each of its settings.
    lonely = running.pipelines.keys() ^ new.pipelines.keys()
    yield from ((PIPELINES, name) for name in sorted(lonely))
    for path in dict.fromkeys((*before, *after)):
        alone = path[0] == PIPELINES and path[1] in lonely
        if not alone and before.get(path) != after.get(path):
            yield path


def _can_change(path: tuple[str, ...]) -> bool:
    within = path[2:] if path[0] == PIPELINES else path
    return any(within[: len(section)] == section for section in _SECTIONS)


def _merge(running: Settings, new: Settings) -> Settings:
    pipelines = {
        name: pipeline.model_copy(update={"batch": new.pipelines[name].batch})
        if name in new.pipelines
        else pipeline
        for name, pipeline in running.pipelines.items()
    }
    return running.model_copy(
        update={
            "log": running.log.model_copy(update={"level": new.log.level}),
            "http": running.http.model_copy(update={key: getattr(new.http, key) for key in _HTTP}),
            "batch": new.batch,
            "pipelines": pipelines,
        }
    )
