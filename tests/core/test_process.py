"""Child processes that answer, fail, die and lose their parent: small modules written for each case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtbuild import errors
from trtbuild.errors import Problem, RecipeError, ToolError, TrtbuildError
from trtbuild.process import WorkerResult, log_tail, run_worker

BUILDER = Path(__file__).resolve().parents[2] / "builder"
Run = Callable[..., WorkerResult]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `source`, the body of a step's function, in a child; what stands in `before` runs while the child loads."""
    monkeypatch.setenv("PYTHONPATH", f"{BUILDER}{os.pathsep}{tmp_path}")

    def start(source: str, request: dict[str, Any] | None = None, *, before: str = "", **options: Any) -> WorkerResult:
        write_step(tmp_path, source, before)
        silent = {"on_progress": lambda *_: None}
        return run_worker("step", request or {}, log=tmp_path / "log.txt", **(silent | options))

    return start


def write_step(directory: Path, source: str, before: str = "") -> None:
    head = "import os, signal, sys, time\nfrom pathlib import Path\nfrom trtbuild import errors\n"
    body = textwrap.indent(textwrap.dedent(source), "    ")
    tail = "from trtbuild.worker import serve\nserve(run)\n"
    (directory / "step.py").write_text(f"{head}{before}\ndef run(request, progress):\n{body}\n{tail}")


def test_the_answer_the_progress_and_the_log(run: Run, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    source = """
        print("to the log")
        progress(1, 2, "half")
        progress(2, 2, "all")
        return {"got": request["text"], "arguments": len(sys.argv), "marked": "TRTBUILD_PARENT_PID" in os.environ}
    """
    text = "é\u2028😀" * 100_000  # more than a pipe holds
    found = run(source, {"text": text}, on_progress=lambda *step: seen.append(step))
    assert found.result == {"got": text, "arguments": 1, "marked": False}
    assert seen == [(1, 2, "half"), (2, 2, "all")]
    assert found.peak_memory_bytes > 1 << 20
    assert found.seconds < 60
    assert (tmp_path / "log.txt").read_text() == "to the log\n"


def test_the_peak_is_not_that_of_who_started_it(run: Run) -> None:
    held = b"x" * (300 << 20)
    assert run("return {}").peak_memory_bytes < len(held)


def test_a_request_in_a_file(run: Run, tmp_path: Path) -> None:
    write_step(tmp_path, 'return {"got": request["a"]}')
    (tmp_path / "request.json").write_text('{"a": "é"}')
    command = [sys.executable, "-m", "step", str(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert json.loads(done.stdout)["result"] == {"got": "é"}


def test_what_a_library_prints_while_it_loads_is_no_answer(run: Run, tmp_path: Path) -> None:
    before = """print("a banner"); print("3"); print('{"a": 1}'); sys.stdout.flush()"""
    assert run("return {}", before=before).result == {}
    assert (tmp_path / "log.txt").read_text() == 'a banner\n3\n{"a": 1}\n'


KINDS = [
    errors.RequestError, errors.CompatibilityError, errors.ToolError, errors.ArtifactError, errors.HostError,
    errors.GateError, errors.TrtbuildError,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_arrives_as_it_was_raised(kind: type[TrtbuildError], run: Run) -> None:
    with pytest.raises(TrtbuildError) as raised:
        run(f'raise errors.{kind.__name__}("where: what is wröng", "what to do")')
    assert type(raised.value) is kind
    assert (raised.value.message, raised.value.hint) == ("where: what is wröng", "what to do")


def test_the_problems_of_a_recipe_arrive(run: Run) -> None:
    problems = (Problem("a.b", "is wrong", "mend it"), Problem("c", "is worse"))
    with pytest.raises(RecipeError) as raised:
        run(f"from trtbuild.errors import Problem\nraise errors.RecipeError({list(problems)!r})")
    assert raised.value.problems == problems


def test_every_error_class_is_tried() -> None:
    known = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, TrtbuildError)}
    assert known == {*KINDS, RecipeError}


def test_an_error_class_of_another_module_is_a_tool_error(run: Run) -> None:
    with pytest.raises(ToolError) as raised:
        run('class Own(errors.TrtbuildError): pass\nraise Own("it broke", "mend it")')
    assert str(raised.value) == "it broke; mend it"


CUT = """
os.write(1, b'{"result": {"a": "' + b"x" * 5000)
os.kill(os.getpid(), signal.SIGKILL)
"""
DEATHS = {
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "",
        r"was ended by SIGKILL \(usually because .* out of memory\) without",
    ),
    "killed while it answers": ("", CUT, r"was ended by SIGKILL(?s:.*)x{300} \.\.\.;"),
    "terminated": ("os.kill(os.getpid(), signal.SIGTERM)", "", "was ended by SIGTERM without an answer"),
    "garbage": ("os._exit(0)", 'print("\\\\xff[garbage", flush=True)', r"exit code 0 without an answer:\n.*garbage"),
    "silent": ("os._exit(3)", "", r"exit code 3 without an answer:\n  \(the log is empty\)"),
    "does not load": ("", "import nonesuch", r"exit code 1 without an answer(?s:.*)No module named 'nonesuch'"),
    "traceback": (
        "deep = {}\ndeep['key that lacks']",
        "",
        r"exit code 1(?s:.*)KeyError: 'key that lacks'",
    ),
}


@pytest.mark.parametrize(("source", "before", "message"), DEATHS.values(), ids=DEATHS)
def test_a_child_that_dies(source: str, before: str, message: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=message) as raised:
        run(source or "pass", before=before)
    assert raised.value.message.startswith("step ")
    assert raised.value.hint == f"the whole log is {tmp_path / 'log.txt'}"
    assert len(raised.value.message) < 3000


def test_the_end_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert log_tail(log) == "  (no log)"
    log.write_bytes("".join(f"line {number}\n" for number in range(20)).encode() + b"\xff\n")
    assert log_tail(log).splitlines() == [*(f"  line {number}" for number in range(9, 20)), "  \ufffd"]


def test_an_interrupt_ends_the_child(run: Run) -> None:
    children: list[int] = []

    def interrupt(done: int, total: int, what: str) -> None:
        children.append(int(what))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("progress(1, 1, str(os.getpid()))\ntime.sleep(600)", on_progress=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


PARENT = """
import sys
from pathlib import Path
from trtbuild.process import run_worker
run_worker("step", {}, log=Path(sys.argv[1]), on_progress=lambda done, total, what: print(what, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_parent_that_ends_takes_its_child_along(number: signal.Signals, run: Run, tmp_path: Path) -> None:
    write_step(tmp_path, "progress(1, 1, str(os.getpid()))\ntime.sleep(600)")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "log.txt")],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=dict(os.environ) | {"TMPDIR": str(temporary)},
    )  # fmt: skip
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(number)
        assert parent.wait(60) != 0
    finally:
        parent.kill()
        parent.communicate()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list(temporary.iterdir()) == []


def is_running(process: int) -> bool:
    """Whether a process runs; one that has ended may wait as a zombie for whoever adopted it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_parent_that_died_before_its_child_asked(run: Run, tmp_path: Path) -> None:
    """Whoever adopts the orphan, be it pid 1 or a subreaper, is not the process that started it."""
    write_step(tmp_path, 'Path("orphan-wrote").touch()\nreturn {}')
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for parent, code in ((gone.pid, 1), (os.getpid(), 0)):
        done = subprocess.run(
            [sys.executable, "-m", "step"], input=b"{}", capture_output=True, check=False, cwd=tmp_path, timeout=60,
            env=dict(os.environ) | {"TRTBUILD_PARENT_PID": str(parent)},
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert bool(done.stdout) == (code == 0)
        assert (tmp_path / "orphan-wrote").exists() == (code == 0)
