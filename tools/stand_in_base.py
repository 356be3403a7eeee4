"""Makes a stand-in for the rocm/pytorch base: `python tools/stand_in_base.py`.

For machines that cannot pull, and for every test: Debian from `debootstrap`, imported as an image, then a venv
at /opt/venv with a CPU build of torch, which is the contract that `docker/Dockerfile.j2` builds upon. A CPU wheel
of torch is looked for in pip's find-links. What exists already with the same inputs is not made again.
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
from radeon_stack.host.engines import client, require_engine
from radeon_stack.images.builder import (
    BuildSettings,
    build,
    build_command,
    building_client,
    default_ca,
    default_pip_conf,
)

PACKAGES = ("ca-certificates", "python3", "python3-venv")
EXCLUDED = ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/cache/apt", "var/lib/apt/lists", "dev")
KEY_LABEL = "radeon-stack.stand-in"
HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", default="radeon-stack/stand-in:cpu")
    parser.add_argument("--suite", default="bookworm", help="Debian release (default: %(default)s)")
    parser.add_argument("--mirror", help="Debian mirror (default: debootstrap's own)")
    parser.add_argument("--torch", default="2.13.0", help="default: %(default)s")
    parser.add_argument("--find-links", type=Path, default=os.environ.get("PIP_FIND_LINKS"), help="folder of wheels")
    parser.add_argument("--network", default="host", help="network of build steps (default: %(default)s)")
    options = parser.parse_args()
    try:
        require_engine()
        rootfs = make_rootfs(options.suite, options.mirror)
        print(make_base(rootfs, options.tag, options.torch, options.find_links, options.network))
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
        say(f"bootstrapping Debian {suite}, about a minute …")
        bootstrap = ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root)]
        done = subprocess.run(
            [*bootstrap, *([mirror] if mirror else [])], capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode:
            raise BuildError(f"debootstrap failed: {(done.stdout.splitlines() or ['no output'])[-1]}")
        import_folder(root, tag)
    return tag


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
    dockerfile = HERE / "stand_in" / "Dockerfile"
    key = digest(rootfs, torch, dockerfile.read_text(), *(f"{w.name}:{w.stat().st_size}" for w in wheels))
    if exists(tag, key):
        return tag
    environ = dict(os.environ)
    settings = BuildSettings(default_ca(environ), default_pip_conf(environ), network)
    with tempfile.TemporaryDirectory(prefix="radeon-stack-") as folder:
        context = Path(folder)
        (context / "wheels").mkdir()
        for wheel in wheels:
            shutil.copy(wheel, context / "wheels")
        shutil.copy(dockerfile, context / "Dockerfile")
        *command, place = build_command(building_client(), context, tag, settings)
        inputs = ["--build-arg", f"ROOTFS={rootfs}", "--build-arg", f"TORCH={torch}", "--label", f"{KEY_LABEL}={key}"]
        build([*command, *inputs, place], say)
    return tag


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
