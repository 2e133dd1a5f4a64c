"""The doctor: what is here is found, what is not is named with what it disables and the command that mends it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from minituner.model.attention_choice import TABLE, Facts, Needs, choose
from minituner.plan import checks, support
from minituner.plan.doctor import Checkup, Machine, checkup, doctor


def by_name(found: list[checks.Check]) -> dict[str, checks.Check]:
    return {check.name: check for check in found}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages have other versions (None: not installed)."""

    def pretend(**other: str | None) -> None:
        wanted = {name.replace("_", "-"): value for name, value in other.items()}

        def fake(name: str) -> str:
            if name in wanted:
                if wanted[name] is None:
                    raise PackageNotFoundError(name)
                return wanted[name]
            return version(name)

        monkeypatch.setattr(checks, "version", fake)

    return pretend


def test_a_check_up_finds_this_machine(own_home: Path) -> None:
    found = checkup()
    assert found.can_train
    named = by_name(found.checks)
    assert {"python", "packages", "GPU", "rates", "compiler", "memory", "disk", "cache"} <= set(named)
    assert named["packages"].values["torch"] == torch.__version__
    assert named["rates"].values["float32_flops"] > 1e8
    assert named["memory"].values["total"] > named["memory"].values["available"] > 0
    assert named["cache"].values == {"folder": str(own_home), "bytes": 0}
    assert "hub" not in named, "nothing is asked of the network unless told to"
    assert all(check.status in get_args(checks.Status) for check in found.checks)


def test_every_gap_says_what_it_disables_and_how_to_mend_it(
    own_home: Path, versions: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine where nothing is as it should be."""
    versions(torch="2.0.0", bitsandbytes=None, deepspeed="0.1", gradio=None, matplotlib=None, peft=None)
    monkeypatch.setattr(checks.shutil, "which", lambda _name: None)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _place: SimpleNamespace(free=10))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2e9, available=1e9))
    monkeypatch.setattr("minituner.plan.flops.gemm_rate", lambda dtype, _device: 2e9 if dtype == torch.float32 else 1e9)
    found = Checkup(list(checks.all_checks()), support.attention_support())
    named = by_name(found.checks)
    expected = {
        "torch": "too old",
        "peft": "missing",
        "bitsandbytes": "missing",
        "deepspeed": "too old",
        "matplotlib": "missing",
        "gradio": "missing",
        "compiler": "missing",
        "rates": "slow",
        "memory": "low",
        "disk": "low",
    }
    assert expected.items() <= {name: check.status for name, check in named.items()}.items()
    assert not found.can_train
    text = repr(found)
    for check in found.checks:
        if check.status != "ok":
            assert check.disables, check.name
            assert check.mend, check.name
            assert f"[{check.status}]" in text
            assert check.mend in text
            assert check.disables in text
    assert named["torch"].mend == "pip install --upgrade 'torch>=2.8'"
    assert "2.0.0, needed >=2.8" in named["torch"].detail
    assert named["bitsandbytes"].mend == "pip install 'minituner[quantization]'"
    assert "torch" not in named["packages"].values


def test_the_needed_versions_are_those_of_pyproject() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    groups = checks.requirements()
    assert {str(r) for r in groups[""]} == set(project["dependencies"])
    for extra, members in groups.items():
        if extra:
            assert [f"{r.name}{r.specifier}" for r in members] == sorted(project["optional-dependencies"][extra])
    extras = set(project["optional-dependencies"]) - {"dev"}
    assert set(checks.EXTRAS) == extras, "each extra says what it is for"


def test_an_old_python_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.9.1")
    check = checks.python()
    assert (check.status, check.detail) == ("too old", "3.9.1, needed >=3.11")


def test_bitsandbytes_without_its_library_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    cextension = pytest.importorskip("bitsandbytes.cextension")
    assert checks.bitsandbytes_library()[0] == "ok"
    monkeypatch.setattr(cextension, "lib", cextension.ErrorHandlerMockBNBNativeLibrary("no library"))
    check = by_name(list(checks.extras()))["bitsandbytes"]
    assert check.status == "broken"
    assert "does not load" in check.detail
    assert "qlora" in check.disables


def test_the_size_of_the_cache_is_counted(own_home: Path) -> None:
    (own_home / "models").mkdir(parents=True)
    (own_home / "models" / "weights").write_bytes(b"x" * 3_000_000)
    (own_home / "gone").symlink_to(own_home / "nowhere")
    check = checks.cache()
    assert check.values["bytes"] >= 3_000_000
    assert "3 MB" in check.detail


# The card


def nvidia_smi(monkeypatch: pytest.MonkeyPatch, driver: str | None) -> None:
    monkeypatch.setattr(checks, "_first_line", lambda *_command: driver)


def test_a_card_that_torch_cannot_use_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    nvidia_smi(monkeypatch, "550.54")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built for CPUs" in checks.gpu().detail
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    check = checks.gpu()
    assert check.status == "broken"
    assert "driver 550.54" in check.detail
    nvidia_smi(monkeypatch, None)
    assert checks.gpu().status == "ok", "a machine without a card lacks nothing"


def test_a_card_is_described(monkeypatch: pytest.MonkeyPatch, versions: Callable[..., None]) -> None:
    card = SimpleNamespace(name="H200", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (140e9, 150e9))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    nvidia_smi(monkeypatch, "580.1")
    assert checks.gpu().detail == "2 x H200, compute capability 9.0, 140 of 150 GB free, CUDA 13.0, driver 580.1"
    versions(flash_attn=None)
    flash = by_name(list(checks.extras()))["flash-attn"]
    assert (flash.status, flash.mend) == ("missing", "pip install 'minituner[flash]' --no-build-isolation")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert by_name(list(checks.extras()))["flash-attn"].status == "ok", "of no use without a GPU"


# The attention support table


@pytest.mark.parametrize(
    "facts",
    [
        Facts(),
        Facts("cuda", "bfloat16", (8, 0), torch_varlen=True),
        Facts("cuda", "bfloat16", (9, 0), torch_varlen=True, installed={"flash-attn-3": "3.0.0"}),
    ],
)
@pytest.mark.parametrize("needs", [Needs(), Needs(sinks=True, sdpa=False)])
def test_the_table_says_what_training_would_take(facts: Facts, needs: Needs) -> None:
    rows = support.attention_support(facts, needs)
    assert [row.implementation for row in rows] == [row.name for row in TABLE]
    taken = [row for row in rows if row.chosen]
    assert [row.implementation for row in taken] == [choose("auto", facts, needs, one_document_rows=False)[0]]
    assert taken[0].usable
    assert taken[0].isolates
    lines = support.as_lines(rows)
    assert len(lines) == 1 + len(TABLE)
    assert f"{taken[0].implementation} *" in "\n".join(lines)
    assert all(row.why for row in rows)
    assert json.loads(json.dumps(support.as_values(rows)))[0]["implementation"] == TABLE[0].name


# The hub


@contextmanager
def server(status: int) -> Iterator[tuple[str, list[str]]]:
    """A hub on this machine that answers every HEAD request with `status`; gives its address and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Nothing is printed."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.mark.parametrize(("status", "expected"), [(200, "ok"), (404, "ok"), (503, "missing")])
def test_a_hub_that_answers(endpoint: Callable[[str], None], status: int, expected: str) -> None:
    with server(status) as (address, asked):
        endpoint(address)
        check = checks.hub()
        assert asked, "it was really asked"
    assert check.status == expected
    assert address in check.detail


def test_a_hub_that_refuses_and_one_that_never_answers(
    endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "HUB_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{silent.getsockname()[1]}"
        endpoint(closed)
        refused = checks.hub()
        silent.listen()
        unanswered = checks.hub()
    for check in (refused, unanswered):
        assert check.status == "missing"
        assert "local folders work" in check.disables
        assert "HF_ENDPOINT" in check.mend


def test_offline_is_not_asked(endpoint: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with server(200) as (address, asked):
        endpoint(address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in checks.hub().detail
        assert not asked


# Notebook and command


def test_the_notebook_s_list_stays_short(own_home: Path) -> None:
    machine = doctor()
    assert isinstance(machine, Machine)
    keys = ["python", "torch", "transformers", "cores", "memory", "device", "data type", "disk", "extras"]
    assert list(machine.facts) == keys
    assert [line.split("  ")[0].strip() for line in repr(machine).splitlines()] == keys


@pytest.mark.slow
def test_the_command_prints_json_and_does_not_import_deepspeed(own_home: Path) -> None:
    """In a fresh process: importing DeepSpeed takes seconds, so the doctor only looks whether it could."""
    code = (
        "import sys; from minituner.cli import app\n"
        "sys.argv = ['minituner', 'doctor', '--json']\n"
        "app(standalone_mode=False)\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["can_train"] is True
    assert {check["name"] for check in found["checks"]} >= {"python", "packages", "GPU", "rates", "cache"}
    assert [row["implementation"] for row in found["attention"]] == [row.name for row in TABLE]
    modules = done.stderr.split()
    assert "minituner.plan.checks" in modules
    assert "deepspeed" not in modules


def test_the_command_fails_where_training_cannot_work(
    own_home: Path, versions: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    from minituner.cli import app

    versions(torch="1.0")
    with pytest.raises(SystemExit) as stop:
        app(["doctor"])
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    assert "[too old]" in printed
    assert "per_document_sdpa *" in printed
