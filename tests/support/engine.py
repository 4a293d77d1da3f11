# SPDX-License-Identifier: Apache-2.0
"""Real docker engines for tests: a dockerd in each `Host`, and images that every engine gets from one file.

`Engine` starts, stops, kills and restarts the daemon and runs `docker` and both composes against it; a
`DockerHost` is a host that has one.  Images are made once for the sources they are made from, in a host with
a way out, and kept in compose/.cache: `workload_images` (Debian with python3 and what the tests send traffic
with) and `project_images` (also the agent's and etcd's).  They are kept as an engine keeps them, so another
has them at once, as links to the same files.

The fixtures are in `tests.support.engine_fixtures`.  Needs root and the packages of `make test`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.support.host import REPO, Host, Process, run, wait_for
from tests.support.require import require

CACHE = REPO / "compose" / ".cache"
WORKLOAD_IMAGE = "holdfast-test/workload:latest"
WORKLOAD_SOURCES = REPO / "tests" / "engine" / "data" / "workload"
IMAGE_SOURCES = (
    *("agent", "bpf", "certs", "cli", "core", "datapath", "external_resources", "identity", "kvstore"),
    *("policy", "prestart", "compose/image", "compose/Dockerfile", "pyproject.toml"),
)
AGENT_IMAGE = "holdfast/agent:latest"
ETCD_IMAGE = "holdfast/etcd:latest"
FETCH_COMPOSE2 = REPO / "tests" / "support" / "fetch_compose2.sh"
COMPOSE_VERSIONS = (1, 2)
START_SECONDS = 60.0
RELOADED = "Reloaded configuration"
BUILD_SECONDS = 600.0


class Engine:
    """A dockerd in `host`.  All it keeps is under the host's directory; its containers die with the host."""

    def __init__(self, host: Host, *, options: Sequence[str] = ()) -> None:
        self.host = host
        self.directory = host.directory / "engine"
        self.directory.mkdir()
        self.data = self.directory / "data"
        # Where nothing else is: the agent's container gets that directory.
        self.socket = self.directory / "run" / "docker.sock"
        self.socket.parent.mkdir()
        self._options = tuple(options)
        self._daemon: Process | None = None

    @property
    def url(self) -> str:
        """The engine's DOCKER_HOST."""
        return f"unix://{self.socket}"

    @property
    def environment(self) -> dict[str, str]:
        """What a command needs to find this engine and no other."""
        return {"DOCKER_HOST": self.url, "DOCKER_BUILDKIT": "0", "COMPOSE_INTERACTIVE_NO_CLI": "1"}

    def start(self) -> Engine:
        """Start the daemon and wait until it answers."""
        base = self.directory
        self._daemon = self.host.popen(
            "dockerd",
            *("--data-root", str(self.data), "--exec-root", f"{base}/exec"),
            *("--pidfile", f"{base}/dockerd.pid", "--host", self.url),
            *("--cgroup-parent", f"/{self.host.name}"),
            *self._options,
        )
        try:
            wait_for(self._answers, "answer of dockerd", seconds=START_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self._daemon.output()[-4000:]}") from error
        return self

    def stop(self) -> None:
        """End the daemon politely: its containers end too, and those with a restart policy come back."""
        if self._daemon is not None:
            self._daemon.stop(timeout=60)

    def kill(self) -> None:
        """SIGKILL to the daemon; its containerd dies with it, containers run on without both."""
        if self._daemon is None:
            return
        self._daemon.kill()
        self._daemon.wait()
        # Both files name processes of a pid namespace in which numbers come again soon.
        (self.directory / "dockerd.pid").unlink(missing_ok=True)
        (self.directory / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def configure(self, **settings: object) -> None:
        """Have the running daemon, and every later one, take these settings (with _ for -)."""
        named = {name.replace("_", "-"): value for name, value in settings.items()}
        (self.host.private("/etc/docker") / "daemon.json").write_text(json.dumps(named))
        assert self._daemon is not None
        daemon = self._daemon
        before = daemon.output().count(RELOADED)
        daemon.kill(signal.SIGHUP)
        wait_for(lambda: daemon.output().count(RELOADED) > before, "dockerd with a new configuration")

    def restart(self) -> Engine:
        """Stop politely and start again, as `systemctl restart docker` does."""
        self.stop()
        return self.start()

    def docker(
        self, *arguments: str, check: bool = True, timeout: float = 60.0, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker …` against this engine."""
        return run(
            ["docker", *arguments], check=check, timeout=timeout, stdin=stdin, environment=self.environment
        )

    def compose(
        self,
        directory: Path,
        *arguments: str,
        version: int = 1,
        check: bool = True,
        timeout: float = 180.0,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run compose 1.29 or 2.x on the file in `directory`; find its containers by their labels."""
        argv = [*compose_command(version), "--project-directory", str(directory), "--file"]
        return run(
            [*argv, str(directory / "docker-compose.yml"), *arguments],
            check=check,
            timeout=timeout,
            environment={**self.environment, **(environment or {})},
        )

    def containers(self, *labels: str) -> list[str]:
        """Return the ids of running containers that carry all of these labels (key or key=value)."""
        filters = [text for label in labels for text in ("--filter", f"label={label}")]
        return self.docker("ps", "--quiet", "--no-trunc", *filters).stdout.split()

    def inspect(self, container: str) -> dict[str, object]:
        """Return what the engine knows of a container."""
        found: list[dict[str, object]] = json.loads(self.docker("inspect", container).stdout)
        return found[0]

    def plant(self, images: Path) -> None:
        """Give an engine that was never started the images that another left in a directory.

        What lists them is copied.  Layers are links where they can be: no engine writes to one again, what a
        container changes goes to a copy.
        """
        self.data.mkdir()
        for part in images.iterdir():
            _copy(part, self.data, link=part.name != "image")

    def _answers(self) -> bool:
        assert self._daemon is None or self._daemon.running, (
            f"dockerd ended:\n{self._daemon.output()[-4000:]}"
        )
        try:
            return self.docker("version", check=False, timeout=10).returncode == 0
        except subprocess.TimeoutExpired:  # it waits for the plugins of containers that it starts
            return False


class DockerHost(Host):
    """A host with a running engine, which has the images of that directory."""

    def __init__(
        self,
        prefix: str = "hf",
        *,
        uplink: bool = False,
        options: Sequence[str] = (),
        images: Path | None = None,
    ) -> None:
        super().__init__(prefix, uplink=uplink)
        self.engine = Engine(self, options=options)
        try:
            if images is not None:
                self.engine.plant(images)
            self.engine.start()
        except BaseException:
            self.stop()
            raise


def compose_command(version: int) -> list[str]:
    """Return how compose of this major version is called; skips the test if it is not here."""
    if version == 1:
        found = shutil.which("docker-compose")
        require(found is not None and _major(found) == 1, "docker-compose 1.29 is not installed")
        return [str(found)]
    fetched = CACHE / "compose2" / "docker-compose"
    if not fetched.exists():
        done = run([str(FETCH_COMPOSE2), str(fetched)], check=False, timeout=BUILD_SECONDS)
        require(done.returncode == 0, f"docker compose 2.x can not be fetched: {done.stderr[-500:]}")
    return [str(fetched)]


def _major(command: str) -> int:
    text = run([command, "version", "--short"], check=False).stdout.strip().lstrip("v")
    return int(text.split(".")[0]) if text[:1].isdigit() else 0


def workload_images() -> Path:
    """Return the directory with the workload image: python3, socat, nc, ping, iperf3, curl on Debian slim."""
    return _cached(f"workload-{digest_of([WORKLOAD_SOURCES])}", _build_workload)


def project_images() -> Path:
    """Return the directory with that and the project's two images, built by the script of `make up`."""
    sources = [WORKLOAD_SOURCES, *(REPO / path for path in IMAGE_SOURCES)]
    base = workload_images()
    return _cached(f"project-{digest_of(sources)}", lambda engine: setup(engine, "up.sh", "image"), base)


def _build_workload(engine: Engine) -> None:
    setup(engine, "base_image.sh")
    engine.docker("build", "--tag", WORKLOAD_IMAGE, str(WORKLOAD_SOURCES), timeout=BUILD_SECONDS)


def _cached(name: str, build: Callable[[Engine], object], base: Path | None = None) -> Path:
    """Return the cached directory of that name, filled by `build` in a host of its own when it is missing."""
    target = CACHE / "images" / name
    if not target.exists():  # who builds another one keeps nobody waiting who has what he needs
        with _one_at_a_time():
            _fill(target, build, base)
    return target


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Have other processes that run tests wait: what one builds, all need."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "images.lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fill(target: Path, build: Callable[[Engine], object], base: Path | None) -> None:
    if target.exists():
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of a test before this one that failed in here
    partial.mkdir(parents=True)
    target.parent.chmod(0o700)  # there are files with setuid in images
    with DockerHost("hfb", uplink=True, images=base) as host:
        build(host.engine)
        host.engine.docker("image", "prune", "--force", timeout=BUILD_SECONDS)  # the stages of the build
        driver = host.engine.docker("info", "--format", "{{.Driver}}").stdout.strip()
        host.engine.stop()
        for part in ("image", driver):
            _copy(host.engine.data / part, partial, link=part != "image")
    _drop_older(target)
    partial.rename(target)


def _copy(source: Path, target: Path, *, link: bool) -> None:
    """Copy a directory into another, by links unless it is on another file system."""
    if not link or run(["cp", "-al", str(source), str(target)], check=False).returncode:
        run(["cp", "-a", "--remove-destination", str(source), str(target)], timeout=BUILD_SECONDS)


def _drop_older(target: Path) -> None:
    """Keep only the newest other one of its kind: a concurrent run may be copying that."""
    kind = target.name.partition("-")[0]
    others = sorted(target.parent.glob(f"{kind}-*"), key=lambda path: path.stat().st_mtime)
    for older in others[:-1]:
        if older.is_dir():
            shutil.rmtree(older)
        else:
            older.unlink()


def setup(
    engine: Engine, script: str, *arguments: str, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run one of compose/setup's scripts inside the engine's host, as a person would there."""
    path = str(REPO / "compose" / "setup" / script)
    return engine.host.exec(
        path, *arguments, check=check, timeout=BUILD_SECONDS, environment=engine.environment
    )


def digest_of(paths: Sequence[Path]) -> str:
    """Return a digest of all files under `paths`: names and contents, without what is compiled."""
    digest = hashlib.sha256()
    for path in paths:
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts and "build" not in file.parts:
                digest.update(f"{file.relative_to(REPO)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]
