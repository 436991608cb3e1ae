from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ingestd.base.errors import Exit, HandlerLoadError
from ingestd.base.record import Records
from ingestd.handlers.load import HandlerSpec, load
from ingestd.registry import SINKS
from ingestd.sinks.jsonl import JsonlSink

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]

FORMS = """
from __future__ import annotations
import collections.abc, functools, typing, msgspec
from ingestd.handlers.batch import Batch

class Click(msgspec.Struct):
    x: int

Clicks = list[Click]

def bare(batch): ...
def lists(batch: list): ...
def dicts(batch: list[dict]): ...
def clicks(batch: list[Click]): ...
def aliased(batch: Clicks): ...
def sequence(batch: collections.abc.Sequence[Click]): ...
def old_sequence(batch: typing.Sequence[Click]): ...
def annotated(batch: typing.Annotated[list[Click], "note"]): ...
def nested(batch: list["Click"]): ...
def batches(batch: Batch[Click]): ...
def bare_batch(batch: Batch): ...
def defaults(batch: list[Click], table="t", *, dry=False): ...
def anything(*args, **kwargs): ...
def unresolvable_elsewhere(batch: list[Click], log: Logger = None) -> Nothing: ...
shorter = lambda batch: None
def _two(table, batch: list[Click]): ...
partial = functools.partial(_two, "t")
def _decorate(f):
    @functools.wraps(f)
    def wrapper(*args): return f(*args)
    return wrapper
@_decorate
def decorated(batch: list[Click]): ...

class Store:
    def __init__(self, *, dsn="", **more): self.got = dsn, more
    def __call__(self, batch: list[Click]): ...
    def method(self, batch: list[Click]): ...
class Static:
    @staticmethod
    def __call__(batch: list[Click]): ...
class Child(Store): ...
instance = Store()
class Name:
    class Space:
        store = Store().method

async def later(batch: list[Click]): ...
class Later:
    async def __call__(self, batch: Batch[Click]): ...
later_instance = Later()
later_partial = functools.partial(later)
"""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "list Any") for name in ("bare", "lists", "anything", "shorter")),
        ("dicts", "list dict"),
        *(
            (name, "list Click")
            for name in (
                "clicks",
                "aliased",
                "sequence",
                "old_sequence",
                "annotated",
                "nested",
                "defaults",
                "unresolvable_elsewhere",
                "partial",
                "decorated",
                "Store",
                "Static",
                "Child",
                "instance",
                "instance.method",
                "Name.Space.store",
            )
        ),
        ("batches", "Batch Click"),
        ("bare_batch", "Batch Any"),
        ("later", "async list Click"),
        ("Later", "async Batch Click"),
        ("later_instance", "async Batch Click"),
        ("later_partial", "async list Click"),
    ],
)
def test_every_form_of_handler(write: Callable[[str], str], name: str, kind: str) -> None:
    module = write(FORMS)
    is_async = kind.startswith("async")
    spec = load(
        f"{module}:{name}", record_format="json", executor="async" if is_async else "process"
    )
    assert spec.is_async is is_async
    assert spec.wants_batch is ("Batch" in kind)
    values, rejections = spec.decoder.decode(Records.lines([b'{"x":1}', b"[]"]))
    if kind.endswith("Click"):
        assert type(values[0]).__name__ == "Click"
        assert len(rejections) == 1
    elif kind.endswith("dict"):
        assert (values, len(rejections)) == ([{"x": 1}], 1)
    else:
        assert values == [{"x": 1}, []]
    assert callable(spec.create({}))


@pytest.mark.parametrize("target", ["builtins:len", "operator:neg", "builtins:print"])
def test_callables_written_in_c(target: str) -> None:
    spec = load(target, record_format="json", executor="thread")
    assert (spec.wants_batch, spec.is_class) == (False, False)


def test_what_has_no_signature_is_taken_on_trust(write: Callable[[str], str]) -> None:
    module = write("import operator\nget = operator.itemgetter(0)\nuse = type('C', (), {})")
    assert load(f"{module}:get", record_format="json", executor="thread").create({})([5]) == 5


CODE = """
import ingestd.handlers.batch, typing
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from somewhere import Hidden
class Plain: pass
def store(batch): ...
def none(): ...
def two(a, b): ...
def keyword(*, batch): ...
def one_dict(batch: dict): ...
def one_str(batch: "str"): ...
def maybe(batch: list | None): ...
def hidden(batch: "list[Hidden]"): ...
def odd(batch: "list[Plain]"): ...
def broken(batch: "list["): ...
def dicts(batch: list[dict]): ...
def yields(batch): yield
async def ayields(batch): yield
async def later(batch): ...
class Empty: pass
class NoArguments:
    def __call__(self): ...
number = 5
def __getattr__(name):
    if name == "boom": raise RuntimeError("no\\nattribute")
    raise AttributeError(name)
"""


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("stroe", {}, "has no 'stroe'; did you mean 'store'?"),
        ("store.x", {}, "store' has no 'x'"),
        ("boom", {}, "raised RuntimeError: no attribute"),
        ("number", {}, "is not callable: it is an int"),
        ("none", {}, "takes (): a handler is called with one argument"),
        ("two", {}, "takes (a, b)"),
        ("keyword", {}, "takes (*, batch)"),
        ("NoArguments", {}, "takes ()"),
        ("Empty", {}, "class Empty has no __call__(self, batch)"),
        (
            "one_dict",
            {},
            "annotated dict, but a handler gets a batch of records: annotate it list[T]",
        ),
        ("one_str", {}, "annotated str"),
        ("maybe", {}, "annotated list | None"),
        ("hidden", {}, "name 'Hidden' is not defined (an import under TYPE_CHECKING is not there"),
        ("broken", {}, "can't be read"),
        ("odd", {}, "into Plain: make it a msgspec.Struct, a dataclass"),
        ("dicts", {"record_format": "text"}, 'not dict; for JSON set format = "json"'),
        ("dicts", {"record_format": "bytes"}, "not dict"),
        ("yields", {}, "contains yield"),
        ("ayields", {"executor": "async"}, "contains yield"),
        ("later", {}, 'is async; set executor.kind = "auto" or "async" (it is "thread")'),
        ("later", {"executor": "process"}, '(it is "process")'),
        ("store", {"executor": "async"}, 'set executor.kind = "auto", "process" or "thread"'),
        ("", {}, "written module:name"),
    ],
)
def test_what_is_wrong_with_the_name(write, name, settings, says) -> None:
    check_refusal(f"{write(CODE)}:{name}", says, **settings)


def check_refusal(target: str, says: str, **settings: str) -> None:
    with pytest.raises(HandlerLoadError) as caught:
        load(target, **({"record_format": "json", "executor": "thread"} | settings))
    message = str(caught.value)
    assert says in message
    assert message.startswith(f"handler {target!r}: ")
    assert "\n" not in message
    assert caught.value.exit_code is Exit.CONFIG


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import nothere_at_all", "imports 'nothere_at_all', which is not there (theirs"),
        ("from os import nothere", "raised ImportError: cannot import name 'nothere'"),
        ("x = 1\nprint(1/0)", "raised ZeroDivisionError: division by zero (theirs"),
        ("x = 1\n\ndef f(:", ".py:3)"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3 (theirs"),
        ("import json\njson.loads('{')", ".py:2)"),
        ("raise RuntimeError('a\\nb' + 'c' * 9999)", "raised RuntimeError: a b"),
        ("raise KeyError", "raised KeyError (theirs"),
    ],
)
def test_what_is_wrong_with_the_module(write, source, says) -> None:
    check_refusal(f"{write(source)}:store", says)


def test_the_line_is_the_users_own(write: Callable[[str], str]) -> None:
    helper = write("def f():\n    import json\n    json.loads('{')")
    module = write(f"\nimport {helper}\n{helper}.f()")
    check_refusal(f"{module}:store", f"({helper}.py:3)")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere:store", "no module named 'nowhere': there is no nowhere.py in /"),
        ("theri:store", "did you mean 'their'?"),
        ("pack.nowhere:store", "there is no pack/nowhere.py in"),
        ("nopack.mod:store", "there is no nopack/mod.py in"),
        ("their.py:store", "written without .py and slashes: their:NAME"),
        ("./pack/mod.py:store", "slashes: pack.mod:NAME"),
        ("their-file:store", "there is no their-file.py in"),
        (".pack:store", "written without .py and slashes: pack:NAME"),
        ("their.py", "is a file; write its module and a name in it: their:NAME"),
        ("their", "is a module; write a name in it as well: their:NAME"),
        ("pack.mod", "as well: pack.mod:NAME"),
        ("jsnol", "did you mean 'jsonl'?"),
        ("postgress", "did you mean 'postgres'?"),
        ("nothing", f"written MODULE:NAME like app:store, nor a sink ({', '.join(SINKS.own)})"),
        ("store", "is neither a function, which is written MODULE:NAME like app:store, nor"),
        ("", "is neither"),
        (":store", "written module:name"),
        ("pack.mod:store", "module 'pack.mod' imports 'pack.gone', which is not there"),
    ],
)
def test_targets_that_are_not_there(write, target, says) -> None:
    write("")
    Path("their.py").touch()
    Path("pack").mkdir()
    Path("pack/__init__.py").touch()
    Path("pack/mod.py").write_text("import pack.gone")
    try:
        check_refusal(target, says)
    finally:
        for name in ("pack", "pack.mod", "their"):
            sys.modules.pop(name, None)


OPTIONS = """
from __future__ import annotations
from ingestd.handlers.context import Context
class Store:
    def __init__(self, *, dsn: str, table: str = "t", batch_size: Unknown = 1):
        if table == "bad": raise ValueError("table: no\\nsuch table")
        if table == "exit": raise SystemExit(4)
        self.got = dsn, table
    def __call__(self, batch): ...
class Open:
    def __init__(self, **options): self.got = options
    def __call__(self, batch): ...
class Asks:
    def __init__(self, place: Context, table="t"): self.got = place, table
    def __call__(self, batch): ...
class DoesNotAsk:
    def __init__(self, context="mine", data_dir="mine"): self.got = context, data_dir
    def __call__(self, batch): ...
class Bare:
    def __call__(self, batch): ...
def function(batch): ...
"""


@pytest.fixture
def spec(write: Callable[[str], str]) -> Callable[[str], HandlerSpec]:
    module = write(OPTIONS)
    return lambda name: load(f"{module}:{name}", record_format="text", executor="thread")


def test_options_go_to_the_constructor_and_each_create_makes_one(spec) -> None:
    store = spec("Store")
    one, other = store.create({"dsn": "d"}), store.create({"dsn": "d", "table": "u"})
    assert (one.got, other.got) == (("d", "t"), ("d", "u"))
    assert spec("Open").create({"any": 1, "thing": [2]}).got == {"any": 1, "thing": [2]}
    assert spec("function").create({}) is spec("function").found


def test_context_comes_to_those_who_ask_by_annotation_only(spec) -> None:
    place, table = spec("Asks").create({"table": "u"}, pipeline="clicks", data_dir="/d").got
    assert (place.pipeline, place.record_format, place.data_dir) == ("clicks", "text", "/d")
    assert table == "u"
    assert spec("DoesNotAsk").create({}, data_dir="/d").got == ("mine", "mine")
    assert spec("Open").create({}).got == {}


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("Store", {"dsn": "d", "tabel": "x"}, "has no option 'tabel'; did you mean 'table'?"),
        ("Store", {"dsn": "d", "q": 1}, "no option 'q' (it has: dsn, table, batch_size)"),
        ("Store", {"table": "x"}, "needs the option 'dsn': set handler.options.dsn"),
        ("Bare", {"x": 1}, "has no option 'x'"),
        ("Asks", {"place": 1}, "'place' is filled in by ingestd and can't be an option"),
        ("function", {"b": 1, "a": 1}, "is no class and takes no options, but got: a, b"),
    ],
)
def test_options_that_do_not_fit_are_found_without_making_it(spec, name, options, says) -> None:
    for attempt in (spec(name).check_options, spec(name).create):
        with pytest.raises(HandlerLoadError) as caught:
            attempt(options)
        assert says in str(caught.value)


@pytest.mark.parametrize(("table", "kind"), [("bad", ValueError), ("exit", SystemExit)])
def test_a_constructor_that_raises(spec, table, kind) -> None:
    spec("Store").check_options({"dsn": "secret", "table": table})
    with pytest.raises(HandlerLoadError) as caught:
        spec("Store").create({"dsn": "secret", "table": table})
    message = str(caught.value)
    assert f"its constructor raised {kind.__name__}: " in message
    assert ".py:" in message
    assert "[options: dsn, table]" in message
    assert "secret" not in message
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, kind)


def test_registered_handlers(write: Callable[[str], str], tmp_path: Path) -> None:
    module = write("def store(batch: list[dict]): ...\ndef other(batch): ...")
    for dist, name, attribute in [
        ("one", "theirs", "store"),
        ("two", "twice", "store"),
        ("three", "twice", "other"),
        ("four", "jsonl", "store"),
    ]:
        info = tmp_path / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[ingestd.handlers]\n{name} = {module}:{attribute}\n"
        )
    sys.path.insert(0, str(tmp_path))
    spec = load("theirs", record_format="json", executor="thread")
    assert spec.found.__name__ == "store"
    check_refusal("twice", "registered by more than one package: three and two")
    check_refusal("their", "did you mean 'theirs'?")
    assert load("jsonl", record_format="json", executor="thread").found is JsonlSink


def test_a_worker_imports_little() -> None:
    code = (
        "import sys, ingestd.handlers.call; from ingestd.handlers.load import load;"
        "load('jsonl', record_format='json', executor='process').create({});"
        "print([m for m in ('pydantic', 'aiohttp', 'structlog', 'prometheus_client', 'asyncio')"
        " if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
