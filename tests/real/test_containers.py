"""The commands of the pages about containers, taken from their text and executed: a real runc, CRIU, and Redis."""

from __future__ import annotations

import re
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazypages.bench.pipes import raised_pipe_limit
from tests.support import docs
from tests.support.criu import makes_none_lazy
from tests.support.docs import Shell, served
from tests.support.hosts import Link, two_hosts
from tests.support.processes import nothing_left, wait_for

DIGEST = re.compile(r"^[0-9a-f]{40}$", re.MULTILINE)
DEMO = ("docs/containers.md", "A container to try it with")
RUNC = ("docs/runc.md", "Restore on the same host")
MOVE = ("docs/runc.md", "Move to another host")
CRUN = ("docs/crun.md", "What it can do")
PODMAN = ("docs/podman.md", "What it can do")
ATTEMPTS = 5
NAMES = ("demo", "moved", "demo1", "demo2")


def blocks(place: tuple[str, str], language: str = "sh") -> list[str]:
    """The blocks of that language in a section of a page, in their order."""
    page, section = place
    return docs.blocks(page, section, language)


def digest(output: str) -> str:
    """Of all that Redis has in its memory."""
    (found,) = DIGEST.findall(output)
    assert set(found) != {"0"}, "it is not empty"
    return str(found)


def check_served(work: Path, images: Path) -> None:
    """A daemon there has served what the images have."""
    log = served(work)
    assert "from local: " in log or makes_none_lazy(images), log


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a test works. Its containers are gone afterwards."""
    with nothing_left():
        try:
            yield tmp_path
        finally:
            for end in (["runc", "delete", "--force"], ["podman", "rm", "--force", "--time", "0"]):
                for name in NAMES:
                    subprocess.run([*end, name], capture_output=True, timeout=60, check=False)


@pytest.mark.loop("criu")
@pytest.mark.parametrize("shim", [False, True], ids=["criu", "shim"])
def test_runc_on_the_same_host(shim: bool, folder: Path) -> None:
    """Also where `criu` is the shim, for runc and for the daemon."""
    (commands,) = blocks(RUNC)
    shell = Shell(folder)
    if shim:
        (folder / "bin").mkdir()
        shell.run("lazypages criu-shim --install bin")
        shell = Shell(folder, path=[folder / "bin"])
        commands, count = re.subn("lazypages serve", "criu -v4 lazy-pages", commands)
        assert count == 1
    before = digest(shell.run("".join(blocks(DEMO))))
    assert digest(shell.run(commands)) == before
    check_served(folder / "restored", folder / "ckpt")


@pytest.mark.slow
def test_a_checkpoint_of_a_container_that_misses_memory(folder: Path) -> None:
    """By RPC, which the shim does not see: the daemon makes CRIU wait, or says that it was too late."""
    (commands,) = blocks(RUNC)
    checkpoint, lazily = commands.split("mkdir restored\n")
    lazily = lazily.replace("lazypages serve", "lazypages serve --no-background").split("runc exec")[0]
    eagerly = re.sub("(?m)^lazypages.*\n", "", lazily).replace("--lazy-pages ", "").replace("ckpt", "again")
    again = checkpoint.replace("ckpt", "again")
    shell = Shell(folder)
    before = digest(shell.run("".join(blocks(DEMO)) + checkpoint))
    while makes_none_lazy(folder / "ckpt"):
        shell.run(f"rm -rf demo ckpt; mkdir -p restored\n{''.join(blocks(DEMO))}{checkpoint}")
    for _ in range(ATTEMPTS):
        shell.run(f"rm -rf restored again; mkdir restored\n{lazily}{again}")
        log = served(folder / "restored")
        if "Discard that dump" not in log:
            break
    else:
        pytest.fail(f"CRIU was faster {ATTEMPTS} times")
    assert "traces it and has to wait for" in log
    assert digest(shell.run(eagerly + blocks(RUNC)[0].splitlines()[-1])) == before


@pytest.mark.slow
def test_two_at_once(folder: Path) -> None:
    """Each has its own daemon and its own memory."""
    (commands,) = blocks(RUNC)
    before, shells, texts = [], [], []
    for number, name in enumerate(NAMES[2:]):
        (folder / name).mkdir()
        shells.append(Shell(folder / name))
        build = re.sub(r"\bdemo\b", name, "".join(blocks(DEMO)).replace("key 400", f"key {number + 400}"))
        texts.append(re.sub(r"\bdemo\b", name, commands))
        before.append(digest(shells[-1].run(build)))
    assert before[0] != before[1]
    started = [shell.start(text) for shell, text in zip(shells, texts, strict=True)]
    outputs = [
        shell.finish(process, text) for shell, process, text in zip(shells, started, texts, strict=True)
    ]
    assert [digest(output) for output in outputs] == before
    for name in NAMES[2:]:
        check_served(folder / name / "restored", folder / name / "ckpt")


@pytest.mark.slow
def test_move_to_another_host(folder: Path) -> None:
    """Two network namespaces. The root file system and the images are already where they are to be copied to."""
    with two_hosts(Link()) as (source, destination), raised_pipe_limit():
        there, here = Shell(folder, source), Shell(folder, destination)
        before = digest(there.run("".join(blocks(DEMO))))
        leave, arrive = blocks(MOVE)
        leaving = there.start(leave + "echo copy\nwait %1\n", SOURCE=source.address)
        try:
            wait_for("the images", lambda: "copy" in there.output.read_text() or leaving.poll() is not None)
            assert digest(here.run(arrive, SOURCE=source.address)) == before
            assert leaving.wait(60) == 0
        finally:
            leaving.kill()
            leaving.wait()
        assert "from remote: " in served(folder / "restored") or makes_none_lazy(folder / "ckpt")
        assert "demo" not in there.run("runc list -q").split()


@pytest.mark.slow
def test_podman(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runtime adds the option. Limits of a container must not be above ours, without CAP_SYS_RESOURCE."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limits = folder / "containers.conf"
    limits.write_text(f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=32768:32768"]\n')
    monkeypatch.setenv("CONTAINERS_CONF", str(limits))
    shell = Shell(folder)
    build, _fill = blocks(DEMO)
    wrapper, fill, again = blocks(PODMAN)
    shell.run(build)
    shell.run("podman create --name demo --rootfs demo/rootfs true")  # of crun
    for text in blocks(PODMAN, "console"):
        shell.check_refusal(text)
    shell.run("podman rm demo")
    before = digest(shell.run(wrapper + fill))
    place = Path(shell.run("podman inspect demo --format '{{.StaticDir}}'").strip())
    assert digest(shell.run(again)) == before
    check_served(place, place / "checkpoint")


def test_crun(tmp_path: Path) -> None:
    (text,) = blocks(CRUN, "console")
    Shell(tmp_path).check_refusal(text)
    version = subprocess.run(["crun", "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert "+SECCOMP" in version.stdout
    assert "+CRIU" not in version.stdout
