"""Images, timed: `python benchmarks/images.py` prints a table and saves images.json. 15 minutes, on an idle engine.

Each figure of ours stands beside the plain command that does the same: `docker build` of the rendered context, `docker
push`, `docker pull`. The registry is Debian's docker-registry on this machine, the other machine a second engine on it:
the network is a loopback, and what is measured is everything else.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from radeon_stack.host.clients import building_client
from radeon_stack.host.engines import client, require_engine
from radeon_stack.images.builder import (
    BuildSettings,
    Output,
    build_command,
    default_ca,
    default_pip_conf,
)

ROOT = Path(__file__).resolve().parent.parent
# Two registries: an engine mounts what it has pushed to one already, and the second push would cost nothing.
PORT, PLAIN_PORT = 5087, 5088
OURS = [sys.executable, "-m", "radeon_stack"]
HIP = "radeon-stack/stand-in:hip"
RENDERS = 5


def main() -> None:
    require_engine()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        environ = {**os.environ, "RADEON_STACK_HOME": str(place / "home")}
        figures["render the matrix"] = matrix()
        figures["cold build"] = cold(place, environ)
        figures["no-op"] = no_op(place, environ)
        figures["one leaf"] = leaf(environ)
        figures["sizes"] = sizes(environ)
        with registry(place, PORT), registry(place, PLAIN_PORT):
            figures["push"], figures["pull"] = transfer(place, environ)
    show(figures)
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": out(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
        "machine": {"cores": os.cpu_count(), "processor": processor(), "engine": client().version()["Version"]},
        "figures": figures,
    }
    (ROOT / "benchmarks" / "images.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def matrix() -> dict[str, float]:
    """Every Dockerfile of every kind and platform, in a process that has imported what it needs."""
    code = (
        "import time\nfrom radeon_stack.catalog.platforms import load_platforms\n"
        "from radeon_stack.images.render import dockerfile\nfrom radeon_stack.images.spec import image_spec\n"
        "t = time.perf_counter()\np = load_platforms()\n"
        "n = [dockerfile(image_spec(k, one)) for k in ('train', 'verify') for one in p.values()]\n"
        "print(time.perf_counter() - t, len(n))"
    )
    told = [out([sys.executable, "-c", code]).split() for _ in range(RENDERS)]
    return {"seconds": round(min(float(seconds) for seconds, _ in told), 3), "dockerfiles": int(told[0][1])}


def cold(place: Path, environ: dict[str, str]) -> dict[str, float]:
    """Every step anew, packages from pip's cache: first once to fill it."""
    run([*OURS, "image", "build", "--arch", "cpu", "--network", "host"], environ)
    ours = seconds([*OURS, "image", "build", "--arch", "cpu", "--network", "host", "--no-cache"], environ)
    run([*OURS, "image", "render", "--arch", "cpu", "-o", str(place / "context")], environ)
    return {"ours": ours, "docker build": seconds(plain(place, no_cache=True), buildkit())}


def no_op(place: Path, environ: dict[str, str]) -> dict[str, float]:
    ours = min(seconds([*OURS, "image", "build", "--arch", "cpu"], environ) for _ in range(RENDERS))
    return {
        "ours": ours,
        "docker build": min(seconds(plain(place, no_cache=False), buildkit()) for _ in range(RENDERS)),
    }


def leaf(environ: dict[str, str]) -> dict[str, float]:
    """flash-attn alone for gfx1201, built anew: beside it the hit, which builds nothing."""
    if not client().images.list(name=HIP):
        run([sys.executable, str(ROOT / "tools" / "stand_in_base.py"), "--hip"], environ)
    which = [*OURS, "image", "wheels", "--arch", "gfx1201", "--base", HIP, "--network", "host"]
    anew = seconds([*which, "--only", "flash-attn"], environ)
    return {"anew": anew, "hit": seconds([*which, "--only", "flash-attn", "--dry-run"], environ)}


def sizes(environ: dict[str, str]) -> dict[str, Any]:
    """Bytes of every image of ours that is here, and what a trim would save on the HIP stand-in's rocBLAS."""
    found = {
        f"{image['kind']} {image['platform']}": image["size"]
        for image in json.loads(out([*OURS, "image", "list", "--json"], environ))
        if image["tags"]
    }
    trims = {}
    for gfx in ("gfx1100", "gfx90a", "gfx1201"):
        told = json.loads(out([*OURS, "image", "size", HIP, "--arch", gfx, "--json"], environ))
        trims[gfx] = told["trim"]["bytes"]
    return {"images": found, "stand-in:hip": told["size"], "trim of stand-in:hip": trims}


def transfer(place: Path, environ: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    where, other = f"localhost:{PORT}", f"localhost:{PLAIN_PORT}"
    ours = seconds([*OURS, "image", "push", "radeon-stack/train:cpu", "--registry", f"{where}/ours"], environ)
    run(["docker", "tag", "radeon-stack/train:cpu", f"{other}/plain:cpu"], environ)
    pushed = {"ours, verified before": ours, "docker push": seconds(["docker", "push", f"{other}/plain:cpu"], environ)}
    run(["docker", "rmi", f"{other}/plain:cpu"], environ)
    tags = json.loads(out(["curl", "-s", f"http://{where}/v2/ours/tags/list"]))["tags"]
    tag = next(tag for tag in tags if tag.startswith("train-"))
    run([*OURS, "image", "promote", f"{where}/ours:{tag}"], environ)
    pulled = {}
    for name, words in (
        ("ours", [*OURS, "pull", "--registry", f"{where}/ours"]),
        ("docker pull", ["docker", "pull", f"{other}/plain:cpu"]),
    ):
        with engine(place / name.replace(" ", "-")) as host:
            pulled[name] = seconds(words, {**environ, "DOCKER_HOST": host, "RADEON_STACK_HOME": str(place / "there")})
    return pushed, pulled


def plain(place: Path, *, no_cache: bool) -> list[str]:
    """`docker build` of the rendered context, with the same secrets."""
    environ = dict(os.environ)
    settings = BuildSettings(default_ca(environ), default_pip_conf(environ), "host", no_cache)
    return build_command(building_client(), place / "context", Output(tag="radeon-stack/plain:cpu"), settings)


def buildkit() -> dict[str, str]:
    return {**os.environ, "DOCKER_BUILDKIT": "1"}


@contextmanager
def registry(place: Path, port: int) -> Iterator[None]:
    config, data = place / f"registry-{port}.yml", place / f"registry-{port}"
    config.write_text(
        f"version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {data}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with subprocess.Popen(
        ["docker-registry", "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(1)
        try:
            yield
        finally:
            process.terminate()


@contextmanager
def engine(root: Path) -> Iterator[str]:
    tool = [sys.executable, str(ROOT / "tools" / "engine.py")]
    try:
        yield out([*tool, "start", "--root", str(root)])
    finally:
        run([*tool, "stop", "--root", str(root)], dict(os.environ))
        shutil.rmtree(root, ignore_errors=True)


def seconds(command: list[str], environ: dict[str, str]) -> float:
    started = time.perf_counter()
    run(command, environ)
    return round(time.perf_counter() - started, 2)


def run(command: list[str], environ: dict[str, str]) -> None:
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def out(command: list[str], environ: dict[str, str] | None = None) -> str:
    return subprocess.run(command, env=environ, check=True, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def show(figures: dict[str, Any]) -> None:
    for name, values in figures.items():
        for what, value in values.items():
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            print(f"{name:<20} {what:<24} {text}")


if __name__ == "__main__":
    main()
