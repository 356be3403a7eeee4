"""Makes a stand-in for the rocm/pytorch base: `python tools/stand_in_base.py [--hip]`.

For machines that cannot pull, and for every test: Debian from `debootstrap`, imported as an image, then a venv
at /opt/venv with a CPU build of torch, which is the contract that `docker/Dockerfile.j2` builds upon. A CPU wheel
of torch is looked for in pip's find-links. With --hip a second base on top of it, with Debian's HIP toolchain: it
compiles for every gfx, without a GPU. What exists already with the same inputs is not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from radeon_stack.errors import BuildError, MachineError, StackError
from radeon_stack.host.clients import building_client
from radeon_stack.host.engines import client, require_engine
from radeon_stack.images.builder import (
    BuildSettings,
    Output,
    build,
    build_command,
    default_ca,
    default_pip_conf,
)
from radeon_stack.images.progress import Steps

CPU_TAG, HIP_TAG = "radeon-stack/stand-in:cpu", "radeon-stack/stand-in:hip"
# A compiler too, as rocm/pytorch has one, and libnuma, with which vLLM is linked.
PACKAGES = ("ca-certificates", "g++", "libnuma1", "patch", "python3", "python3-venv")
EXCLUDED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists", "dev")
KEY_LABEL = "radeon-stack.stand-in"
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hip", action="store_true", help="make radeon-stack/stand-in:hip too")
    parser.add_argument("--hip-suite", default="sid", help="Debian suite of the toolchain (default: %(default)s)")
    parser.add_argument("--suite", default="bookworm", help="Debian release (default: %(default)s)")
    parser.add_argument("--mirror", help="Debian mirror (default: debootstrap's own)")
    parser.add_argument("--torch", default="2.13.0", help="default: %(default)s")
    parser.add_argument("--find-links", type=Path, default=os.environ.get("PIP_FIND_LINKS"), help="folder of wheels")
    parser.add_argument("--network", default="host", help="network of build steps (default: %(default)s)")
    options = parser.parse_args()
    try:
        require_engine()
        rootfs = make_rootfs(options.suite, options.mirror)
        cpu = make_base(rootfs, CPU_TAG, options.torch, options.find_links, options.network)
        print(cpu)
        if options.hip:
            print(make_hip(cpu, options.hip_suite, options.network))
    except StackError as error:
        print(f"stand-in: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def make_rootfs(suite: str, mirror: str | None) -> str:
    """The image of a minimal Debian with Python; bootstrapped only when the engine has none for these inputs."""
    key = digest(suite, mirror or "", *PACKAGES, *EXCLUDED)
    tag = f"radeon-stack/stand-in-rootfs:{suite}-{key}"
    if exists(tag):
        return tag
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise MachineError("debootstrap and root are needed", remedy="sudo apt-get install debootstrap")
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        root = Path(folder) / "rootfs"
        quick_dpkg(root)
        say(f"bootstrapping Debian {suite}, about a minute …")
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root)]
        done = subprocess.run(
            [*bootstrap, *([mirror] if mirror else [])], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise BuildError(f"debootstrap failed: {(done.stdout.splitlines() or ['no output'])[-1]}")
        import_folder(root, tag)
    return tag


def quick_dpkg(root: Path) -> None:
    """Before a Debian is written to `root`: its dpkg is not to wait for the disk at each file, as in Debian's own."""
    settings = root / "etc/dpkg/dpkg.cfg.d"
    settings.mkdir(parents=True)
    (settings / "unsafe-io").write_text("force-unsafe-io\n", encoding="utf-8")


def import_folder(root: Path, tag: str) -> None:
    """Stream a root file system into the engine as an image of one layer."""
    excludes = [f"--exclude=./{path}/*" for path in EXCLUDED]
    with subprocess.Popen(
        ["tar", "--create", "--numeric-owner", *excludes, "--directory", str(root), "."], stdout=subprocess.PIPE
    ) as tar:
        done = subprocess.run(["docker", "import", "-", tag], stdin=tar.stdout, capture_output=True, check=False)
    if done.returncode or tar.returncode:
        raise BuildError(f"docker import failed: {done.stderr.decode(errors='replace').strip()}")


def make_base(rootfs: str, tag: str, torch: str, find_links: Path | None, network: str) -> str:
    """The base image on a rootfs; built only when its inputs changed."""
    wheels = sorted(Path(find_links).glob(f"torch-{torch}*.whl")) if find_links else []
    dockerfile = HERE / "stand_in" / "cpu.Dockerfile"
    key = digest(rootfs, torch, dockerfile.read_text(), *(f"{w.name}:{w.stat().st_size}" for w in wheels))
    if exists(tag, key):
        return tag
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        context = Path(folder)
        (context / "wheels").mkdir()
        for wheel in wheels:
            shutil.copy(wheel, context / "wheels")
        build_stand_in(dockerfile, context, tag, key, {"ROOTFS": rootfs, "TORCH": torch}, network)
    return tag


def make_hip(cpu: str, suite: str, network: str) -> str:
    """The base with a HIP toolchain, on top of the CPU one; built only when its inputs changed."""
    dockerfile = HERE / "stand_in" / "hip.Dockerfile"
    key = digest(str(client().images.get(cpu).id), suite, dockerfile.read_text())
    if not exists(HIP_TAG, key):
        with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
            build_stand_in(dockerfile, Path(folder), HIP_TAG, key, {"CPU": cpu, "SUITE": suite}, network)
    return HIP_TAG


def build_stand_in(
    dockerfile: Path, context: Path, tag: str, key: str, arguments: dict[str, str], network: str
) -> None:
    """Build one Dockerfile, labelled with the key of its inputs."""
    shutil.copy(dockerfile, context / "Dockerfile")
    environ = dict(os.environ)
    settings = BuildSettings(default_ca(environ), default_pip_conf(environ), network)
    *command, place = build_command(building_client(), context, Output(tag=tag), settings)
    inputs = [word for name, value in arguments.items() for word in ("--build-arg", f"{name}={value}")]
    steps = Steps(lambda step: say(f"{step.title}: {step.state} {step.seconds:.0f} s") if step.seconds > 1 else None)
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as logs:
        log = Path(logs) / "log.txt"
        try:
            build([*command, *inputs, "--label", f"{KEY_LABEL}={key}", place], steps, log)
        except BuildError as error:
            raise BuildError(f"{error.what}\n{log.read_text()[-2000:]}") from error


def exists(tag: str, key: str | None = None) -> bool:
    """Has the engine an image of this tag, with this key where one is given?"""
    found = client().images.list(name=tag)
    return any(key is None or image.labels.get(KEY_LABEL) == key for image in found)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
