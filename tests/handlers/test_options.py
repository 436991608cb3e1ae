"""Options as a struct: what is understood, what is refused, and what is never shown."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from msgspec import Meta

from ingestd.base.errors import HandlerLoadError
from ingestd.base.record import Records, Span
from ingestd.handlers.batch import Batch, Blocked, Unavailable
from ingestd.handlers.context import Context
from ingestd.handlers.options import Extra, FilePath, OptionError, Seconds, Secret, Size, redactor
from ingestd.handlers.outcome import Job, SinkFinding
from ingestd.handlers.runner import HandlerConfig, Runner
from ingestd.sinks.base import SinkOptions

HERE = "tests.handlers.test_options:"


class ShopOptions(SinkOptions, frozen=True, kw_only=True):
    dsn: Annotated[Secret, Meta(description="connection")]
    path: FilePath | None = None
    size: Annotated[Size, Meta(description="bytes")] = Size(1024)
    wait: Seconds = Seconds(0.25)
    mode: Literal["append", "upsert"] = "append"
    rows: Annotated[int, Meta(ge=1, le=9)] = 3
    fast: bool = False
    keys: list[str] = []  # noqa: RUF012
    mapping: dict[str, str] = {}  # noqa: RUF012

    def __post_init__(self) -> None:
        if self.mode == "upsert" and not self.keys:
            raise ValueError("keys: upsert needs some")


class Shop:
    def __init__(self, options: ShopOptions, context: Context) -> None:
        self.options, self.context = options, context

    def __call__(self, batch: Batch[bytes]) -> None:
        if self.options.mode == "upsert":
            raise Blocked(f"no right for {self.options.dsn}")
        if self.options.fast:
            raise Unavailable(f"cannot reach {self.options.dsn}")
        batch.reject(0, f"refused by {self.options.dsn}")

    def check(self) -> list[SinkFinding]:
        if self.options.fast:
            raise OSError(f"connecting to {self.options.dsn}")
        return [SinkFinding("warning", f"fsync is off at {self.options.dsn}")]


class Needy(Shop):
    EXTRA = Extra("shop", ("json", "no_such_client"))


def runner(**options: object) -> Runner:
    one = Runner(HandlerConfig(HERE + "Shop", options, "json", "thread", "default", b"/x"))
    assert one.prepare() == ""
    return one


def test_text_from_flags_becomes_what_is_meant() -> None:
    written = {
        "dsn": "x", "path": "a/b", "size": "2KiB", "wait": "1m", "mode": "upsert", "rows": "7",
        "fast": "true", "keys": '["a"]', "mapping": '{"a":"b"}',
    }  # fmt: skip
    made = ShopOptions.of(**written)
    assert made == ShopOptions(
        dsn=Secret("x"), path=FilePath("a/b"), size=Size(2048), wait=Seconds(60), mode="upsert",
        rows=7, fast=True, keys=["a"], mapping={"a": "b"},
    )  # fmt: skip
    assert ShopOptions.of(dsn="x") == ShopOptions(dsn=Secret("x"))


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"dns": "x"}, "has no option 'dns'; did you mean 'dsn'?"),
        ({"zzz": 1}, "has no option 'zzz' (it has: dsn, path, size"),
        ({}, "needs the option 'dsn': set handler.options.dsn"),
        ({"dsn": 5}, "dsn: *** is not text"),
        ({"dsn": ""}, "dsn: *** is not text"),
        ({"size": "12 parsecs"}, "size: '12 parsecs' is not a size: a number of bytes"),
        ({"size": 0}, "size: 0 is not a size of at least 1 byte"),
        ({"size": True}, "size: True is not a size"),
        ({"wait": "-1s"}, "wait: '-1s' is not a time"),
        ({"wait": -1}, "wait: -1 is not a time"),
        ({"mode": "insert"}, "mode: 'insert' is not append or upsert"),
        ({"rows": 10}, "rows: 10 is not a whole number of at least 1 and at most 9"),
        ({"rows": "many"}, "rows: 'many' is not a whole number"),
        ({"fast": "perhaps"}, "fast: 'perhaps' is not true or false"),
        ({"path": "a\0"}, "is not a path"),
        ({"keys": "a"}, "keys: 'a' is not right: Expected `array`"),
        ({"mode": "upsert"}, "keys: upsert needs some"),
    ],
)
def test_what_is_refused(written: dict[str, object], says: str) -> None:
    with pytest.raises(OptionError) as caught:
        ShopOptions.of(**({} if not written else {"dsn": "x"} | written))
    assert says in str(caught.value)


def test_help_lists_all_of_it() -> None:
    kinds = {one.name: (one.kind, one.default) for one in ShopOptions.help()}
    assert kinds == {
        "dsn": ("secret", None), "path": ("path", ""), "size": ("size", "1KiB"),
        "wait": ("time", "250ms"), "mode": ("append | upsert", "append"), "rows": ("number", "3"),
        "fast": ("true or false", "false"), "keys": ("list", ""), "mapping": ("table", ""),
    }  # fmt: skip
    assert ShopOptions.help()[0].text == "connection"


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://ann:hunter%202@db/x", "host=db password=hunter2 user=ann",
        r"host=db password='hun\'ter2'", "hunter2",
    ],
)  # fmt: skip
def test_a_secret_and_its_password_are_masked_in_whatever_is_told(dsn: str) -> None:
    secrets = ShopOptions.of(dsn=dsn).secrets()
    assert dsn in secrets
    for password in {"hunter%202", "hunter 2", "hunter2", r"hun'ter2"} & set(secrets):
        assert redactor(secrets)(f"a {password} b {dsn} c") == "a *** b *** c"
    assert len(secrets) > 1 or dsn == "hunter2"
    assert dsn not in repr(ShopOptions.of(dsn=dsn))


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"mode": "upsert", "keys": ["a"]}, "blocked"), ({"fast": True}, "unavailable")],
)  # fmt: skip
def test_failures_findings_and_rejections_tell_no_secret(more, reason: str) -> None:
    one = Job("j-1", 1, Records.lines([b"1", b"2"]), [Span(1, 0, 2)], "j")
    worker = runner(dsn="s3cret", **more)
    failure = worker.run(one).failure
    assert failure is not None
    assert failure.reason == reason
    assert "***" in failure.error
    assert "s3cret" not in failure.error + failure.traceback
    (finding,) = worker.check()
    assert finding.level == ("error" if reason == "unavailable" else "warning")
    assert "***" in finding.text
    assert "s3cret" not in finding.text
    (rejected,) = runner(dsn="s3cret").run(one).rejections
    assert rejected.error == "refused by ***"


def test_a_missing_extra_names_the_pip_line() -> None:
    config = HandlerConfig(HERE + "Needy", {"dsn": "x"}, "json", "thread", "default", b"/x")
    with pytest.raises(HandlerLoadError) as caught:
        Runner(config).prepare()
    assert "needs no_such_client: pip install 'ingestd[shop]'" in str(caught.value)
