"""Every example in docs/HANDLERS.md is run."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sqlite3
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ingestd.base.envelope import Envelope
from ingestd.base.record import Records, Span
from ingestd.execution.settings import HandlerSettings
from ingestd.handlers.batch import Batch
from ingestd.handlers.call import call, close
from ingestd.handlers.chain import Transform
from ingestd.handlers.load import load
from ingestd.handlers.outcome import Job
from ingestd.testing.plugin import ingestd_async_harness, ingestd_harness

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ingestd_async_harness", "ingestd_harness"]

PAGE = (Path(__file__).parents[2] / "docs" / "HANDLERS.md").read_text()
BLOCKS = {
    match[1]: match[2]
    for match in re.finditer(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL)
}
TOML = [tomllib.loads(text) for text in re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)]
CLICKS = [b'{"user":"ann","page":1}', b'{"user":"bob","page":"x"}', b'{"user":"cy","page":3}']


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the page's modules into the current folder; loads one of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *filter(None, sys.path)])
    for name, source in BLOCKS.items():
        Path(f"{name}.py").write_text(source)
    yield lambda target: load(target, record_format="json", executor="thread")
    for name in BLOCKS:
        sys.modules.pop(name, None)


def test_no_example_is_left_out() -> None:
    assert PAGE.count("```python") == len(BLOCKS)
    handlers = {"store", "clicks", "pages", "placed", "orders", "events", "once", "test_orders"}
    handlers |= {"test_stored", "test_pushed"}
    assert set(BLOCKS) == handlers | {"pools", "own_pool", "cluster", "shop", "warehouse"}


def test_a_pool_of_processes(example) -> None:
    with importlib.import_module("pools").processes() as executor:
        assert executor.submit(abs, -1).result() == 1


def test_an_executor_of_a_package(example) -> None:
    pool = importlib.import_module("own_pool")
    with pool.PoolKind().build(pool.PoolKind.settings(threads=2)) as executor:
        assert executor.submit(abs, -1).result() == 1


# Not imported: it asks each class of exceptions for its hash, also the odd ones of other tests.
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs distributed")
def test_an_executor_of_dask(tmp_path: Path) -> None:
    (tmp_path / "cluster.py").write_text(BLOCKS["cluster"])
    script = """if __name__ == "__main__":
        import cluster
        from distributed import Client, LocalCluster
        with LocalCluster(n_workers=1, dashboard_address=None) as local:
            cluster.Client = lambda _: Client(local)
            print(cluster.dask().submit(abs, -1).result())
    """
    (tmp_path / "main.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, capture_output=True, timeout=120, check=False
    )
    assert done.stdout == b"1\n", done.stderr


def run(spec: Any, job: Any, **create: Any) -> Any:
    handler = spec.create(create.pop("options", {}), **create)
    result = call(spec, handler, job)
    assert close(spec, handler) is None
    return result


def test_functions(example, job: Callable[..., Any], capsys) -> None:
    assert run(example("store:store"), job(CLICKS)).failure is None
    assert capsys.readouterr().out == "ann\nbob\ncy\n"
    result = run(example("clicks:store"), job(CLICKS))
    assert capsys.readouterr().out == "ann 1\ncy 3\n"
    (lost,) = result.rejections
    assert (lost.index, lost.error) == (1, "Expected `int`, got `str` - at `$.page`")
    assert lost.error in PAGE


def test_a_class_with_its_options(example, job) -> None:
    handler = TOML[0]["handler"]
    assert run(example(handler["target"]), job(CLICKS), options=handler["options"]).failure is None
    db = sqlite3.connect(handler["options"]["path"])
    assert db.execute("select count(*) from clicks").fetchone() == (3,)
    db.close()


def test_context(example, job, capsys) -> None:
    assert run(example("placed:Store"), job(CLICKS), data_dir="/d", pipeline="p").failure is None
    assert capsys.readouterr().out == "/d/p-json 3\n"


def test_outcomes(example, job, capsys) -> None:
    orders = [b'{"total":1}', b"{}", b'{"total":-1}']
    result = run(example("orders:store"), job(orders, attempt=2))
    assert [(r.index, r.error) for r in result.rejections] == [(1, "no total")]
    assert [(r.index, r.after) for r in result.retries] == [(2, 60.0)]
    assert capsys.readouterr().out == "again: j1-7\n"
    result = run(example("orders:store"), job([b'{"total":1,"test":true}'] * 2))
    assert [r.error for r in result.rejections] == ["a batch of test orders"] * 2


def test_where_a_record_came_from(example, capsys) -> None:
    sent = Envelope("http", client="shop", headers={"x-github-event": "push"})
    importlib.import_module("events").store(Batch.of([1], id="j-1", envelope=sent))
    assert capsys.readouterr().out == "2026/01/01/j-1 shop push 1\n"
    importlib.import_module("events").store(Batch.of([2]))
    assert capsys.readouterr().out == "2026/01/01/test-1   2\n"


def test_exactly_once(example, job, tmp_path: Path) -> None:
    for _ in range(3):
        result = run(example("once:Store"), job(CLICKS), options={"path": "once.db"})
        assert result.failure is None
    db = sqlite3.connect("once.db")
    assert db.execute("select count(*) from clicks").fetchone() == (3,)
    db.close()


def test_a_function_in_front_of_two_sinks(example) -> None:
    (chained,) = (one["handler"] for one in TOML if "targets" in one.get("handler", {}))
    assert HandlerSettings(**chained).all_targets == ("jsonl", "sqlite")
    transform = Transform(chained["transform"], "json")
    records = [b'{"user":"Ann","page":1}', b'{"user":"x","page":2,"bot":true}']
    changed = transform.apply(Job("j-1", 1, Records.lines(records), [Span(1, 0, 2)], "j"))
    assert changed.job is not None
    assert changed.job.records.payload == b'{"user":"ann","page":1}\n'


def test_options_as_a_struct(example) -> None:
    spec = example("warehouse:Store")
    made: Any = spec.create({"dsn": "s3cret", "piece": "1MiB"})
    assert made.options.piece == 1024**2
    assert spec.secrets_of({"dsn": "s3cret"}) == ["s3cret"]


def test_the_users_own_test(example) -> None:
    importlib.import_module("test_orders").test_orders_without_a_total_are_rejected()


def test_the_users_own_tests_with_a_harness(example, ingestd_harness, tmp_path: Path) -> None:
    tests = importlib.import_module("test_stored")
    tests.test_a_refund_comes_again_and_its_neighbours_go_on(ingestd_harness)
    tests.test_each_click_is_stored_once(ingestd_harness, tmp_path)


async def test_the_users_own_test_that_is_a_coroutine(example, ingestd_async_harness) -> None:
    tests = importlib.import_module("test_pushed")
    await tests.test_a_batch_is_pushed(ingestd_async_harness)
