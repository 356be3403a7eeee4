"""Is there an engine that can build images and give containers the GPUs?"""

from __future__ import annotations

from radeon_stack.catalog.sizes import format_size
from radeon_stack.catalog.versions import version
from radeon_stack.host.checks.finding import Check, Finding, Fix, as_root, fail, ok, skipped, warn
from radeon_stack.host.engines import STANDARD, EngineProbe, service
from radeon_stack.host.facts import Facts
from radeon_stack.host.gpus import Gpu
from radeon_stack.host.machine import KFD

ANNOTATIONS = "5.1"  # its release notes: the Compat Create endpoint now supports setting container annotations
LEAST_API = "1.41"  # Docker 20.10, the oldest that our tests run with
# A base is 20 to 30 GB, its layers are there twice while they are unpacked; and a model: third-party figures.
FIRST_PULL = 60 << 30
NO_ENGINE = "no engine answers (RS201)"
SLOW_STORAGE = ("vfs", "devicemapper", "aufs")
PODMAN_SOCKET = (
    "systemctl --user enable --now podman.socket",
    "export DOCKER_HOST=unix:///run/user/$(id -u)/podman/podman.sock",
)
DOCKER_SOCKET = "export DOCKER_HOST=unix:///var/run/docker.sock"
# How a distribution installs, and which engine it has of its own, by the words of its ID and ID_LIKE.
PACKAGES = {
    "debian": ("apt-get install -y", "docker.io"),
    "ubuntu": ("apt-get install -y", "docker.io"),
    "fedora": ("dnf install -y", "moby-engine"),
    "rhel": ("dnf install -y", "podman"),
    "centos": ("dnf install -y", "podman"),
    "arch": ("pacman -S --needed", "docker"),
    "suse": ("zypper install -y", "docker"),
}


def answers(facts: Facts) -> Finding:
    """Does a container engine answer at DOCKER_HOST, or at Docker's socket? Podman's socket is one too.

    It is asked for two seconds at most. Where this Python has all packages, `--engine local` works without one.
    """
    engine = facts.engine
    if engine is None:
        silent = "engine" in facts.late
        return fail("the engine did not answer in time", *_bring_up(facts)) if silent else skipped("not known")
    if engine.answers:
        return ok(f"{engine.what} at {engine.address}")
    if engine.denied:
        return _denied(facts, engine)
    if facts.packages_missing == ():
        return warn(f"{engine.why_not}; --engine local works without one", *_bring_up(facts), fixes=_fixes(facts))
    return fail(engine.why_not, *_bring_up(facts), fixes=_fixes(facts))


def _denied(facts: Facts, engine: EngineProbe) -> Finding:
    """Docker's socket belongs to a group whose members can become root: joining it is left to a person."""
    if "podman" in engine.address:
        return fail(f"{engine.why_not}: that podman is root's; yours is another socket", *PODMAN_SOCKET)
    member = facts.groups.get("docker")
    if member is not None and facts.machine.user.name in member.members:
        return fail(f"{engine.why_not}; you are in the group docker, and this login is older", "newgrp docker")
    return fail(
        f"{engine.why_not}; after joining the group docker, log out and in again. Its members can become root",
        as_root(facts, "usermod -aG docker $USER"),
    )


def api(facts: Facts) -> Finding:
    """Is the engine's API new enough? 1.41 is Docker 20.10, the oldest that is tested."""
    engine = facts.engine
    if engine is None or not engine.answers:
        return skipped(NO_ENGINE)
    if engine.product == "podman":
        return ok(f"podman {engine.version}, by its Docker-compatible socket (API {engine.api})")
    found, least = version(engine.api), version(LEAST_API)
    if found is None or least is None or found >= least:
        return ok(f"API {engine.api}")
    return fail(f"API {engine.api} is older than {LEAST_API} (Docker 20.10)", *_install(facts))


def buildkit(facts: Facts) -> Finding:
    """Images are built by BuildKit, through a docker command on PATH; newer ones have it in the plugin buildx.

    It is only needed for building: a published image can be pulled without.
    """
    if facts.engine is None or not facts.engine.answers:
        return skipped(NO_ENGINE)
    if facts.engine.product == "podman":
        return ok("podman builds rendered folders by itself; its socket has no BuildKit, which `image build` takes")
    if facts.buildkit is None:
        return skipped("not known")
    if not facts.buildkit:
        return warn(
            "no docker command here builds with BuildKit; images can be pulled, not built",
            *_install(facts, "docker-buildx"),
        )
    baking = "and buildx bakes several images at once" if facts.buildx else "without buildx: images one by one"
    return ok(f"BuildKit, {baking}")


def rootless(facts: Facts) -> Finding:
    """Docker Desktop cannot pass a Radeon on. Rootless engines have no more rights than you:

    Rootless podman passes your groups on when asked: from 5.1 on we ask by the socket, before that its
    containers.conf has to say so. Rootless Docker drops them, and so opens no device node that asks for a group.
    """
    engine = facts.engine
    if engine is None or not engine.answers:
        return skipped(NO_ENGINE)
    if engine.desktop:
        said = "Docker Desktop runs containers in a virtual machine, which has no /dev/kfd"
        native = () if "dockerd" in facts.programs else _install(facts)
        return fail(said, *native, DOCKER_SOCKET) if facts.machine.gpus else warn(said)
    if not engine.rootless:
        return ok("with root: containers are given the device nodes' groups by number")
    needed = [node for path, node in facts.machine.nodes.items() if path == KFD or "/renderD" in path]
    closed = [node for node in needed if node.mode & 0o006 != 0o006]
    asked = (version(engine.version) or ()) >= (version(ANNOTATIONS) or ())
    if engine.product == "podman" and closed and not asked and not facts.keeps_groups:
        return fail(
            f"rootless podman before {ANNOTATIONS} keeps your groups only when its containers.conf says so",
            "mkdir -p ~/.config/containers/containers.conf.d",
            "printf '[containers]\\nannotations = [\"run.oci.keep_original_groups=1\"]\\n' "
            "> ~/.config/containers/containers.conf.d/groups.conf",
            "systemctl --user restart podman.socket",
        )
    if engine.product == "podman":
        return ok("rootless podman: number 0 inside is you, with your groups")
    if closed:
        return fail(
            f"rootless Docker drops your groups: no container can open {closed[0].path}; rootless podman keeps them",
            *(() if "podman" in facts.programs else _install(facts, "podman")),
            *_podman_socket(facts),
        )
    return ok("rootless Docker; no GPU here asks for a group")


def storage(facts: Facts) -> Finding:
    """Storage drivers that copy whole layers make an image of 20 GB into many times that."""
    engine = facts.engine
    if engine is None or not engine.answers or not engine.storage:
        return skipped(NO_ENGINE)
    if engine.storage in SLOW_STORAGE:
        return warn(f"storage driver {engine.storage}: each layer is copied whole; overlay2 is not", "docker info")
    return ok(engine.storage)


def disk(facts: Facts) -> Finding:
    """Is there room for a first image? A base is 20 to 30 GB, and is there twice while it is unpacked."""
    if facts.engine is None or not facts.engine.answers:
        return skipped(NO_ENGINE)
    if facts.engine_free is None:
        return skipped("the engine's folder is not on this machine, or not ours to look at")
    free = f"{format_size(facts.engine_free)} free in {facts.engine.root}"
    if facts.machine.gpus and not facts.images and facts.engine_free < FIRST_PULL:
        return warn(
            f"{free}; a first image needs about {format_size(FIRST_PULL)}", "docker system df", "docker image prune"
        )
    return ok(free)


def cdi(facts: Facts) -> Finding:
    """CDI names (`amd.com/gpu=0`) are used where a specification means exactly the chosen cards; else paths are.

    A specification is written once, by `amd-ctk cdi generate`: after a change of cards it is old.
    """
    engine = facts.engine
    if engine is None or not engine.answers or not engine.cdi or not facts.machine.gpus:
        return skipped("no CDI here, and none is needed")
    if not facts.cdi:
        return skipped("no specification for AMD GPUs; device nodes are passed by path")
    listed = {node for device in facts.cdi for node in device.nodes}
    absent = [gpu for gpu in facts.machine.gpus if not gpu.integrated and gpu.render_node not in listed]
    if absent:
        return warn(f"the specification is older than GPU {absent[0].index}", as_root(facts, _generate(absent[0])))
    return ok(f"{len(facts.cdi)} names in /etc/cdi")


def selinux(facts: Facts) -> Finding:
    """SELinux keeps containers from files that are not labelled for them: your models and data.

    Runs have `label=disable` then, in place of labelling your folders anew.
    """
    if not facts.machine.selinux:
        return skipped("SELinux does not enforce")
    if facts.engine is None or not facts.engine.answers:
        return skipped(NO_ENGINE)
    if facts.engine.selinux:
        return ok("enforcing: runs have label=disable, since your model and data keep their labels")
    return ok("enforcing; this engine sets no labels")


def _generate(gpu: Gpu) -> str:
    return "amd-ctk cdi generate --output=/etc/cdi/amd.json"


def _bring_up(facts: Facts) -> tuple[str, ...]:
    """What is installed is started; where nothing is, an engine is installed first."""
    told = facts.environment.get("DOCKER_HOST", "")
    if told and told != STANDARD and "podman" not in told:
        return ("unset DOCKER_HOST",)  # somebody pointed us elsewhere: that comes first
    if "dockerd" in facts.programs:
        return _service(facts, "start" if facts.engine is None or facts.engine.absent else "restart")
    install = _install(facts)
    if "podman" in facts.programs or any(command.endswith(" podman") for command in install):
        return *(() if "podman" in facts.programs else install), *_podman_socket(facts)
    # Debian and its kin start the service when they install it; a start more does no harm.
    return (*install, *_service(facts, "start")) if install else ()


def _podman_socket(facts: Facts) -> tuple[str, ...]:
    if not facts.systemd:
        return ("podman system service --time 0 &", "export DOCKER_HOST=unix:///run/podman/podman.sock")
    if facts.machine.user.uid == 0:
        return "systemctl enable --now podman.socket", "export DOCKER_HOST=unix:///run/podman/podman.sock"
    return PODMAN_SOCKET


def _install(facts: Facts, package: str = "") -> tuple[str, ...]:
    """How this distribution installs a package, or its own engine; nothing where that is not known."""
    for word in facts.distribution.split():
        if word in PACKAGES:
            command, engine = PACKAGES[word]
            first = (as_root(facts, "apt-get update"),) if command.startswith("apt-get") else ()
            return (*first, as_root(facts, f"{command} {package or engine}"))
    return ()


def _service(facts: Facts, verb: str) -> tuple[str, ...]:
    return (service(verb, systemd=facts.systemd, root=facts.machine.user.uid == 0),)


def _fixes(facts: Facts) -> tuple[Fix, ...]:
    if "dockerd" not in facts.programs:
        return ()  # to install something is not for us to do
    if facts.systemd:
        return (Fix(("systemctl", "start", "docker"), ("systemctl", "stop", "docker")),)
    return (Fix(("service", "docker", "start"), ("service", "docker", "stop")),)


CHECKS = (
    Check("RS201", "container engine", answers),
    Check("RS202", "engine API", api),
    Check("RS203", "BuildKit", buildkit),
    Check("RS204", "rights of the engine", rootless),
    Check("RS205", "storage driver", storage),
    Check("RS206", "disk of the engine", disk),
    Check("RS207", "CDI", cdi),
    Check("RS208", "SELinux", selinux),
)
