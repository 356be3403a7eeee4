"""Images for real: built in stages, verified, rendered, audited, published, pulled, run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.catalog.platforms import load_platforms
from radeon_stack.codeobjects.report import audit
from radeon_stack.codeobjects.sources import entries
from radeon_stack.errors import CheckError, Exit
from radeon_stack.host.clients import baking_client, building_client
from radeon_stack.host.engines import client
from radeon_stack.images.builder import BuildSettings, default_ca, default_pip_conf
from radeon_stack.images.builds import Workplace, bake_images, ensure_wheel
from radeon_stack.images.references import repository
from radeon_stack.images.registry import Registry
from radeon_stack.images.render import image_key
from radeon_stack.images.shared_wheels import fetch_wheels, push_wheels
from radeon_stack.images.spec import image_spec
from radeon_stack.images.store import WheelStore
from tests.conftest import ROOT, Cli, wait_for
from tests.engine.conftest import CANARY, PASSWORD, RealRegistry

pytestmark = [pytest.mark.engine, pytest.mark.work]
NETWORK = ("--network", "host")
UNREACHABLE = "127.0.0.1:9"  # the discard port: nobody answers


def test_building_twice_does_nothing_the_second_time_and_says_so(image: str) -> None:
    before = client().images.get(image).id
    done = subprocess.run(
        ["make", "image", "ARCH=cpu", "BUILD_NETWORK=host"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "nothing to do: it was built from the same inputs" in done.stdout
    assert client().images.get(image).id == before


def test_a_base_that_cannot_be_reached_is_exit_5_with_what_was_tried_and_what_can_be_done(cli: Cli) -> None:
    result = cli("image", "build", "--rocm", "7.1.1", "--arch", "gfx1201", "--base-registry", UNREACHABLE)
    assert result.code == Exit.IMAGE
    for part in ("rocm/pytorch:rocm7.1.1", f"the engine's images, then {UNREACHABLE}", "--base IMAGE",
                 "--base-registry HOST", "radeon-stack pull --arch gfx1201"):  # fmt: skip
        assert part in result.error, part


def test_an_image_for_rocm_on_a_base_without_hip_runs_every_stage_and_fails_in_the_last(
    cli: Cli, hip_base: str, home: Path
) -> None:
    result = cli("image", "build", "--arch", "gfx1201", "--base", hip_base, *NETWORK)
    assert result.code == Exit.BUILD, result.err
    assert "torch 2.13.0+cpu is no HIP build; ROCm 7.1.1 was asked for" in result.error
    assert not client().images.list(name="radeon-stack/train:rocm7.1.1-gfx1201")
    for stage in ("wheel-flash-attn-build", "requirements-build", "runtime"):
        assert re.search(rf"^[✓=] {stage}", result.err, flags=re.MULTILINE), result.err
    log = next((home / "builds").glob("*-train-rocm7.1.1-gfx1201-*/log.txt")).read_text()
    assert "verify: ✓ bitsandbytes" in log and "libbitsandbytes_rocm71.so" in log
    # The flash-attn wheel was built for real, and is kept: only its leaf is built anew when asked for.
    (wheel,) = (home / "wheels").glob("flash-attn-*/flash_attn-*.whl")
    names = [entry.name for entry in entries(wheel)]
    assert "flash_attn/flash_attn_triton_amd/fwd_prefill.py" in names
    again = cli("image", "wheels", "--arch", "gfx1201", "--base", hip_base, "--only", "flash-attn", "--json", *NETWORK,
                "--export", home / "out")  # fmt: skip
    assert again.code == 0, again.err
    (row,) = again.json
    assert (
        row["name"] == "flash-attn" and (home / "out" / wheel.name).read_bytes() == Path(row["files"][0]).read_bytes()
    )


SETUP = """
from setuptools import setup
from setuptools.dist import Distribution
class Binary(Distribution):
    def has_ext_modules(self): return True
setup(name="hip-probe", version="1.0", packages=["hip_probe"], package_data={"hip_probe": ["*.so"]}, distclass=Binary)
"""
KERNEL = """
#include <hip/hip_runtime.h>
__global__ void scale(float* x, float a) { x[blockIdx.x * blockDim.x + threadIdx.x] *= a; }
extern "C" void run(float* x, float a) { scale<<<1, 64>>>(x, a); }
"""
WHEEL = """
version = "1.0"
job_memory = "1GiB"
default.rdna = "build"
default.cdna = "build"
source = "a test"
[variants.build]
git = "git://127.0.0.1:{port}/probe"
ref = "{commit}"
"""
BUILD = """
hipcc --offload-arch="$GFX" -shared -fPIC -o hip_probe/libprobe.so kernel.hip
pip wheel . --no-deps --no-build-isolation --wheel-dir /wheels
"""


@pytest.fixture
def hip_extension(tmp_path: Path) -> Iterator[Path]:
    """A docker folder with a small HIP extension as its only wheel, from a repository that git serves here."""
    repository = tmp_path / "served" / "probe"
    (repository / "hip_probe").mkdir(parents=True)
    for name, text in (("setup.py", SETUP), ("kernel.hip", KERNEL), ("hip_probe/__init__.py", "")):
        (repository / name).write_text(text)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", "-C", str(repository)]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "probe"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    docker = tmp_path / "docker"
    shutil.copytree(ROOT / "docker", docker)
    wheel = docker / "wheels" / "hip-probe"
    wheel.mkdir()
    (wheel / "wheel.toml").write_text(WHEEL.format(port=port, commit=commit))
    (wheel / "build.sh").write_text(BUILD)
    (docker / "locks" / "wheel-hip-probe-build.tools.txt").write_text("# none\n")
    (docker / "locks" / "sources.toml").write_text(f'[commits]\n"git://127.0.0.1:{port}/probe {commit}" = "{commit}"\n')
    kinds = docker / "kinds.toml"
    kinds.write_text(
        kinds.read_text().replace('wheels.rocm = ["bitsandbytes", "flash-attn"]', 'wheels.rocm = ["hip-probe"]')
    )
    daemon = subprocess.Popen(
        ["git", "daemon", "--export-all", f"--base-path={repository.parent}", "--listen=127.0.0.1", f"--port={port}"],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, seconds=10, what="git's daemon")
        yield docker
    finally:
        daemon.terminate()
        daemon.wait()


def test_a_hip_extension_is_compiled_for_each_gfx_without_a_gpu_and_holds_that_gfx_alone(
    hip_extension: Path, hip_base: str, home: Path
) -> None:
    environ = dict(os.environ)
    settings = BuildSettings(default_ca(environ), default_pip_conf(environ), "host")
    told: list[str] = []
    place = Workplace(home, settings, lambda step: told.append(f"{step.title} {step.state}"))
    identity = str(client().images.get(hip_base).id)
    for gfx in ("gfx1201", "gfx1100", "gfx942"):
        platform = load_platforms(hip_extension).find(gfx, "7.1.1")
        spec = image_spec("train", platform, base=hip_base, identity=identity, docker=hip_extension)
        (wheel,) = spec.wheels
        (built,) = ensure_wheel(spec, wheel, place).files
        found = audit(entries(built), gfx)
        assert [name for name, _ in found.files[0].targets] == [gfx] and found.missing == ()
        told.clear()
        assert ensure_wheel(spec, wheel, place).files == [built]  # a hit builds nothing
        assert all("from the store" in line for line in told) and len(told) == 1


def test_a_wheel_that_one_machine_built_another_takes_from_the_registry(
    registry: RealRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker({**os.environ, "DOCKER_CONFIG": str(tmp_path)}, "login", registry.host, "--username", "radeon",
           "--password-stdin", input=PASSWORD)  # fmt: skip
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    where = Registry(repository(f"{registry.host}/radeon/stack"))
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "probe-1.0-py3-none-any.whl").write_bytes(b"wheel")
    here, there = WheelStore(tmp_path / "here"), WheelStore(tmp_path / "there")
    assert fetch_wheels(where, there, "probe", "k") is None
    push_wheels(where, here.put("probe", "k", tmp_path / "built", {"variant": "v"}))
    found = fetch_wheels(where, there, "probe", "k")
    assert found is not None and found.files[0].read_bytes() == b"wheel" and found.record["variant"] == "v"
    assert there.get("probe", "k") == found and here.get("probe", "k") is not None
    found.files[0].write_bytes(b"other")
    with pytest.raises(CheckError, match="not what was stored"):
        there.get("probe", "k")


def test_what_is_rendered_builds_with_plain_docker_and_without_us(cli: Cli, image: str, tmp_path: Path) -> None:
    folder = tmp_path / "context"
    assert cli("image", "render", "--arch", "cpu", "-o", folder).code == 0
    assert {"Dockerfile", "docker-bake.json", "image.json", "requirements.txt", "radeon_stack"} <= set(
        os.listdir(folder)
    )
    secrets = ["--secret", f"id=ca,src={default_ca(dict(os.environ))}"] if default_ca(dict(os.environ)) else []
    conf = default_pip_conf(dict(os.environ))
    secrets += ["--secret", f"id=pip,src={conf}"] if conf else []
    done = subprocess.run(
        [building_client(), "build", "--quiet", "--network", "host", *secrets, str(folder)],
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = client().images.get(done.stdout.strip())
    assert made.labels["radeon-stack.kind"] == "train"
    assert made.labels["radeon-stack.key"] == image_key(image_spec("train", load_platforms()["cpu"]))


def test_a_build_from_the_lock_and_a_filled_store_needs_no_network(cli: Cli, image: str) -> None:
    refused = cli("image", "build", "--arch", "cpu", "--offline", "--no-cache")
    assert refused.code == Exit.IMAGE and "requirements is not in the local store" in refused.error
    filled = cli("image", "wheels", "--arch", "cpu", *NETWORK)
    assert filled.code == 0, filled.err
    built = cli("image", "build", "--arch", "cpu", "--offline", "--no-cache", "--json")
    assert built.code == 0, built.err
    assert built.json["built"] and any("stored/requirements" in step["step"] for step in built.json["steps"])


def test_two_images_are_baked_in_one_graph_where_docker_has_buildx(image: str, tmp_path: Path, home: Path) -> None:
    baker = baking_client()
    if baker is None:
        pytest.skip("no docker client has buildx (Debian: docker-buildx)")
    folder = tmp_path / "docker"
    shutil.copytree(ROOT / "docker", folder)
    kinds = (folder / "kinds.toml").read_text()
    train = kinds[kinds.index("[train]") : kinds.index("[verify]")]
    (folder / "kinds.toml").write_text(
        kinds + train.replace("[train]", "[first]") + train.replace("[train]", "[second]")
    )
    for name in ("first", "second"):
        shutil.copy(folder / "locks" / "train-cpu.txt", folder / "locks" / f"{name}-cpu.txt")
    environ = dict(os.environ)
    place = Workplace(home, BuildSettings(default_ca(environ), default_pip_conf(environ), "host"), lambda step: None)
    identity = str(client().images.get("radeon-stack/stand-in:cpu").id)
    specs = [
        image_spec(name, load_platforms(folder)["cpu"], identity=identity, docker=folder)
        for name in ("first", "second")
    ]
    try:
        baked = bake_images(specs, place, baker)
        assert [one.tag for one in baked] == ["radeon-stack/first:cpu", "radeon-stack/second:cpu"]
        assert all(one.built for one in baked) and baked[0].id != baked[1].id
        # What they share was built once: one download of the requirements for both.
        assert sum("requirements-build" in s.title and "pip" in s.title for s in baked[0].steps) <= 1
        assert not any(one.built for one in bake_images(specs, place, baker))
    finally:
        for name in ("first", "second"):
            for found in client().images.list(name=f"radeon-stack/{name}"):
                client().images.remove(found.id, force=True)


def test_an_image_above_its_budget_is_not_tagged(cli: Cli, image: str) -> None:
    result = cli("image", "build", "--arch", "cpu", "--budget", "100MiB", *NETWORK)
    assert result.code == Exit.BUILD and "above the budget of 100MiB" in result.error


def test_no_secret_proxy_ca_or_path_of_this_machine_is_in_any_layer_label_or_history(
    image: str, canaries: dict[str, str]
) -> None:
    """Every layer's every file is searched, and the image's own description."""
    words = [CANARY, PASSWORD, str(ROOT), *(value for name, value in canaries.items() if name != "NO_PROXY")]
    conf = default_pip_conf(dict(os.environ))
    words += re.findall(r"(?:https?|file)://\S+", conf.read_text()) if conf else []
    needles = [word.encode() for word in words if word not in ("//", "/")]
    found = client().images.get(image)
    told = json.dumps(found.history()) + json.dumps(found.attrs)
    assert not [word for word in words if word in told]
    searched = 0
    with (
        subprocess.Popen(["docker", "save", found.id], stdout=subprocess.PIPE) as saved,
        tarfile.open(fileobj=saved.stdout, mode="r|") as outer,
    ):
        for member in outer:
            layer = outer.extractfile(member)
            if layer is None or not member.name.endswith("layer.tar"):
                continue
            with tarfile.open(fileobj=layer, mode="r|") as files:
                for file in files:
                    stream = files.extractfile(file) if file.isreg() else None
                    hits = _hits(stream, needles) if stream else []
                    assert not hits, f"{file.name}: {hits}"
                    searched += 1
    assert searched > 10_000


def _hits(stream: Any, needles: list[bytes]) -> list[bytes]:
    rest, found = b"", []
    while chunk := stream.read(1 << 22):
        seen = rest + chunk
        found += [needle for needle in needles if needle in seen]
        rest = chunk[-100:]
    return found


def test_an_image_is_verified_once_more_and_tells_its_size(cli: Cli, image: str) -> None:
    told = cli("image", "verify", image, "--json")
    assert told.code == 0, told.err
    states = {check["name"]: check["state"] for check in told.json["checks"]}
    assert states["base"] == states["nf4"] == states["adamw8bit"] == "ok" and states["sdpa"] == "not run"
    sizes = cli("image", "size", image, "--json").json
    assert sizes["packages"]["torch"] > 300 << 20 and sizes["layers"] and sizes["gfx"]["gfx1201"] > 0
    assert cli("image", "verify", image, "--on-gpu").code == Exit.MACHINE


def docker(environ: dict[str, str], *words: str, **more: Any) -> str:
    done = subprocess.run(["docker", *words], env=environ, capture_output=True, text=True, check=True, **more)
    return done.stdout + done.stderr


def test_pushed_promoted_pulled_on_another_machine_through_a_registry_that_dies_and_run(
    cli: Cli,
    image: str,
    registry: RealRegistry,
    another_machine: dict[str, str],
    tiny_run: tuple[str, ...],
    tmp_path: Path,
) -> None:
    where = f"{registry.host}/radeon/stack"
    here = {**os.environ, "DOCKER_CONFIG": str(tmp_path / "docker")}
    there = {**another_machine, "DOCKER_CONFIG": str(tmp_path / "docker")}

    refused = cli("pull", "--registry", where, env=there)
    assert refused.code == Exit.IMAGE and f"docker login {registry.host}" in refused.error
    docker(here, "login", registry.host, "--username", "radeon", "--password-stdin", input=PASSWORD)

    outputs = []
    pushed = cli("image", "push", image, "--registry", where, "--json", env=here)
    assert pushed.code == 0, pushed.err
    tag, digest = pushed.json["tag"], pushed.json["digest"]
    assert re.fullmatch(r"train-cpu-[0-9a-f]{16}", tag)
    nothing = cli("pull", "--registry", where, env=there)
    assert nothing.code == Exit.IMAGE and "no image in this channel" in nothing.err  # pushed is not promoted
    promoted = cli("image", "promote", f"{where}:{tag}", "--json", env=here)
    assert promoted.json == {"tag": f"{where}:train-cpu-stable", "before": None, "after": digest}
    outputs += [pushed, promoted, cli("image", "push", image, "--registry", where, env=here)]
    assert outputs[-1].code == 0, outputs[-1].err  # the same again is no other

    # The registry dies when some megabytes are through, and comes back.
    def die() -> None:
        blobs = Path(there["RADEON_STACK_HOME"]) / "blobs"
        wait_for(lambda: sum(f.stat().st_size for f in blobs.glob("*")) > 30 << 20, seconds=60, what="some megabytes")
        registry.kill()
        time.sleep(1.5)
        registry.start()

    killer = threading.Thread(target=die)
    killer.start()
    pulled = cli("pull", "--registry", where, "--json", env=there)
    killer.join()
    assert pulled.code == 0, pulled.err
    assert "again in" in pulled.err and "status=206" in registry.log.replace("http.response.", "")
    assert "why: train, for a machine without a GPU" in pulled.err and "free" in pulled.err
    assert pulled.json["image"] == f"{where}@{digest}"
    assert pulled.json["id"] == client().images.get(image).id
    assert not list((Path(there["RADEON_STACK_HOME"]) / "blobs").glob("*"))
    again = cli("pull", "--registry", f"{UNREACHABLE}/away", "--registry", where, env=there)
    assert "does not answer" in again.err  # and the next source is asked
    assert "nothing to download: the engine has it" in again.err

    # To the byte it is the image in which the demo is run to its end elsewhere.
    ran = cli(*tiny_run, "--engine", "docker", "--image", pulled.json["image"], env=there)
    assert ran.code == 0, ran.err
    assert ran.json["result"]["steps"] == 12 and ran.json["image"] == pulled.json["id"]
    assert Path(ran.json["artifacts"]["merged"], "model.safetensors").is_file()

    for output in (*outputs, pulled, again, ran):
        assert PASSWORD not in output.out + output.err
    assert PASSWORD not in registry.log

    # Its bill of materials is found by whoever asks the registry for what refers to it.
    sbom = _sbom(where, digest, tmp_path)
    names = {component["name"]: component["version"] for component in sbom["components"]}
    assert sbom["bomFormat"] == "CycloneDX" and names["torch"] == "2.13.0+cpu" and "libc6" in names


def _sbom(where: str, digest: str, tmp_path: Path) -> Any:
    code = (
        "import sys, json\n"
        "from radeon_stack.images.references import repository\n"
        "from radeon_stack.images.registry import Registry\n"
        "r = Registry(repository(sys.argv[1]))\n"
        "index = r.index(sys.argv[2].replace(':', '-'))\n"
        "manifest = r.manifest(index['manifests'][0]['digest'])\n"
        "print(r.read_blob(manifest.layers[0]['digest'], 1 << 24).decode())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, where, digest],
        env={**os.environ, "DOCKER_CONFIG": str(tmp_path / "docker")},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)
