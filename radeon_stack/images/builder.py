"""Builds a context folder with BuildKit through the docker command line: the SDK has no BuildKit."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from radeon_stack.errors import BuildError
from radeon_stack.host.clients import client_environment
from radeon_stack.images.progress import Steps

CA_VARIABLES = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class BuildSettings:
    """What this machine adds to a build: secrets by file, never by value. None of it moves a key."""

    ca: Path | None = None
    pip_conf: Path | None = None
    network: str = "default"
    no_cache: bool = False


@dataclass(frozen=True)
class Output:
    """What a build gives: a tagged image, an image's id in a file, or a stage's files in a folder."""

    tag: str | None = None
    id_file: Path | None = None
    stage: str | None = None
    folder: Path | None = None


def build_command(client: str, folder: Path, output: Output, settings: BuildSettings) -> list[str]:
    """The argv of a build. Secrets are named with the file they are in."""
    command = [client, "build", "--network", settings.network, "--progress", "plain"]
    command += ["--tag", output.tag] if output.tag else []
    command += ["--iidfile", str(output.id_file)] if output.id_file else []
    command += ["--target", output.stage] if output.stage else []
    command += ["--output", f"type=local,dest={output.folder}"] if output.folder else []
    command += ["--no-cache"] if settings.no_cache else []
    for name, path in (("ca", settings.ca), ("pip", settings.pip_conf)):
        command += ["--secret", f"id={name},src={path}"] if path else []
    for name in PROXY_VARIABLES:
        # By name: docker takes the value from its environment, and keeps these names out of layers and history.
        command += ["--build-arg", name] if name in os.environ else []
    return [*command, str(folder)]


def bake_command(client: str, bake_file: Path, metadata: Path, settings: BuildSettings) -> list[str]:
    """The argv that builds every target of a bake file in one graph."""
    command = [client, "buildx", "bake", "--file", str(bake_file), "--metadata-file", str(metadata)]
    command += ["--progress", "plain", "--set", f"*.network={settings.network}"]
    command += ["--no-cache"] if settings.no_cache else []
    for name, path in (("ca", settings.ca), ("pip", settings.pip_conf)):
        command += ["--set", f"*.secrets=id={name},src={path}"] if path else []
    for name in PROXY_VARIABLES:
        command += ["--set", f"*.args.{name}"] if name in os.environ else []
    return command


def build(command: list[str], steps: Steps, log: Path, *, folder: Path | None = None) -> None:
    """Run a build: its lines go to the log, its steps are told. BuildError names the step that failed and the log."""
    with (
        log.open("a", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            env=client_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder,
        ) as child,
    ):
        for line in child.stdout or ():
            kept.write(line)
            steps.feed(line.rstrip("\n"))
    if child.returncode:
        what = f"{steps.failed}: {steps.reason}" if steps.failed else steps.reason or "it said nothing"
        raise BuildError(what, where=f"docker build (exit {child.returncode})", remedy=f"the full log: {log}")


def default_ca(environ: dict[str, str]) -> Path | None:
    """A private CA bundle that this machine's programs are told to use."""
    named = (environ.get(variable) for variable in CA_VARIABLES)
    return next((Path(name) for name in named if name and Path(name).is_file()), None)


def default_pip_conf(environ: dict[str, str]) -> Path | None:
    """pip's settings on this machine, with its mirrors."""
    home = Path(environ.get("HOME", "/"))
    named = environ.get("PIP_CONFIG_FILE")
    places = [Path(named)] if named else []
    places += [home / ".config" / "pip" / "pip.conf", home / ".pip" / "pip.conf", Path("/etc/pip.conf")]
    return next((place for place in places if place.is_file()), None)
