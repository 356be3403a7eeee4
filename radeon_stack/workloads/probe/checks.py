"""What must hold in an image. A check is one function in one list; it gives its evidence, or says what is wrong.

Each takes the image's description (`image.json`) with `base` (`base.json`) in it. Those that need a GPU are recorded
as not run until somebody has one: `image verify --on-gpu`.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from radeon_stack.errors import CheckError, StackError
from radeon_stack.workloads.probe import linking, numerics
from radeon_stack.workloads.probe.base import guarded, normal

Description = Mapping[str, Any]
# 0.50.0 is the first release that is right on warps of 32 (bitsandbytes pull requests 1885 and 1887).
BITSANDBYTES_AT_LEAST = (0, 50)
LLAMA_CPP_NEEDS = {"sse4_2", "avx", "avx2", "bmi2", "fma", "f16c"}  # docker/wheels/llama-cpp-python/build.sh
IMPORT_SECONDS = 300


@dataclass(frozen=True)
class Check:
    """`needs`: what the machine must have for it."""

    name: str
    about: str
    run: Callable[[Description], str]
    needs: Literal["cpu", "gpu"] = "cpu"
    applies: Callable[[Description], bool] = lambda _: True


@dataclass(frozen=True)
class Outcome:
    """How a check ended: `ok`, `failed`, or `not run` with the reason."""

    name: str
    state: Literal["ok", "failed", "not run"]
    detail: str


def run_checks(description: Description, *, on_gpu: bool) -> Iterator[Outcome]:
    """Run all that apply, in order; a failure does not keep the others from being told."""
    for check in CHECKS:
        if not check.applies(description):
            continue
        if check.needs == "gpu" and not on_gpu:
            yield Outcome(check.name, "not run", "needs a GPU: radeon-stack image verify --on-gpu")
            continue
        try:
            yield Outcome(check.name, "ok", check.run(description))
        except StackError as error:
            yield Outcome(check.name, "failed", str(error))
        except Exception as error:  # whatever a broken library throws is what is wrong with it
            yield Outcome(check.name, "failed", f"{type(error).__name__}: {str(error)[:500]}")


def torch_build(description: Description) -> str:
    """torch is what the platform says, and a HIP build of the release where there is one."""
    import torch

    found, wanted, hip = torch.__version__.partition("+")[0], description["torch"], torch.version.hip
    if description["rocm"] and hip is None:
        raise CheckError(f"torch {torch.__version__} is no HIP build; ROCm {description['rocm']} was asked for")
    if found != wanted:
        raise CheckError(f"torch is {torch.__version__}, the platform's is {wanted}")
    if description["rocm"] is None:
        return f"torch {torch.__version__}"
    release = ".".join(description["rocm"].split(".")[:2])
    if ".".join(hip.split(".")[:2]) != release:
        raise CheckError(f"torch is built for HIP {hip}, not for ROCm {description['rocm']}")
    return f"torch {torch.__version__}, HIP {hip}"


def base_untouched(description: Description) -> str:
    """torch and triton are the files that the base brought."""
    before = {one["name"]: one for one in description["base"]["guarded"]}
    after = {one.name: asdict(one) for one in guarded()}
    if "torch" not in after:
        raise CheckError("the base has no torch in /opt/venv")
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise CheckError(f"replaced after the base: {', '.join(changed)}")
    return ", ".join(f"{name} {one['version']}" for name, one in after.items())


def no_nvidia(_: Description) -> str:
    """No library of CUDA came along."""
    names = sorted({normal(str(dist.metadata["Name"])) for dist in distributions()})
    foreign = [name for name in names if name.startswith(("nvidia-", "cuda-"))]
    if foreign:
        raise CheckError(f"CUDA packages: {', '.join(foreign)}")
    return f"none among {len(names)}"


def one_triton(description: Description) -> str:
    """Exactly one triton, with AMD's backend; on a CPU at most one."""
    found = [one for one in guarded() if "triton" in one.name]
    if description["rocm"] is None:
        return "none" if not found else f"{found[0].name} {found[0].version}"
    if len(found) != 1:
        raise CheckError(f"{len(found)} distributions of triton: {', '.join(one.name for one in found) or 'none'}")
    if find_spec("triton.backends.amd") is None:
        raise CheckError(f"{found[0].name} {found[0].version} has no backend for AMD")
    wanted = description["triton"]
    if wanted and found[0].version.partition("+")[0] != wanted:
        raise CheckError(f"triton is {found[0].version}, the platform's is {wanted}")
    return f"{found[0].name} {found[0].version}"


def imports(description: Description) -> str:
    """Everything the kind promises is imported; what needs a GPU to import is found."""
    for name in description["imports"]:
        import_module(name)
    for name in description["apart"]:
        _import_apart(name)
    missing = [name for name in description["modules"] if not _is_there(name)]
    if missing:
        raise CheckError(f"not found: {', '.join(missing)}")
    return f"{len(description['imports']) + len(description['apart'])} imported, {len(description['modules'])} found"


def _import_apart(name: str) -> None:
    """CheckError with what it said last, when a module cannot be imported. Nothing it writes is kept."""
    with TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            cwd=folder, capture_output=True, text=True, check=False, timeout=IMPORT_SECONDS,
        )  # fmt: skip
    if done.returncode:
        raise CheckError(f"{name} cannot be imported: {(done.stderr.strip().splitlines() or ['it said nothing'])[-1]}")


def linked(description: Description) -> str:
    """The extension modules of what the kind promises find the libraries that they are linked with."""
    packages = tuple(dict.fromkeys(name.partition(".")[0] for name in description["imports"]))
    modules = tuple(linking.look(packages))
    wrong = [f"{module.name} needs {', '.join(module.lost)}" for module in modules if module.lost]
    if wrong:
        raise CheckError("; ".join(wrong) + ": not found")
    unknown = sum(module.lost is None for module in modules)
    if unknown == len(modules) > 0:
        raise CheckError(f"the dynamic loader told of none of {unknown} extension modules: is a space in their path?")
    return f"{len(modules)} extension modules in {len(packages)} packages" + (
        f", {unknown} of which cannot be told from here" if unknown else ""
    )


def requirements_met(description: Description) -> str:
    """Every requirement is there in a version that is taken, but for those left out on purpose.

    What the base brought and did not meet itself is the base's affair; what it met, it must meet still.
    """
    without = {normal(name) for name in description["without"]}
    before: dict[str, str] = description["base"]["installed"]
    wrong, count = [], 0
    for dist, requirement in _requirements():
        needed, name = normal(requirement.name), normal(str(dist.metadata["Name"]))
        if needed in without:
            continue
        count += 1
        try:
            found: str | None = version(requirement.name)
        except PackageNotFoundError:
            found = None
        if _meets(found, requirement):
            continue
        if before.get(name) == dist.version and not _meets(before.get(needed), requirement):
            continue
        wrong.append(f"{name} needs {requirement}, " + (f"here is {found}" if found else "which is missing"))
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckError("; ".join(wrong[:3]) + more)
    return f"{count} requirements"


def bitsandbytes_native(description: Description) -> str:
    """A release that is right on RDNA, with the library it will load."""
    import bitsandbytes

    found = version("bitsandbytes")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < BITSANDBYTES_AT_LEAST:
        raise CheckError(f"bitsandbytes {found} is older than 0.50: wrong results on RDNA")
    folder = Path(bitsandbytes.__file__).parent
    wanted = f"libbitsandbytes_rocm{description['rocm_short']}.so" if description["rocm"] else "libbitsandbytes_cpu.so"
    if not (folder / wanted).is_file():
        there = ", ".join(sorted(path.name for path in folder.glob("libbitsandbytes_*.so")))
        raise CheckError(f"bitsandbytes {found} has no {wanted}; it has {there or 'no library'}")
    return f"bitsandbytes {found}, {wanted}"


def llama_cpp_vectors(_: Description) -> str:
    """llama.cpp's products on the CPU are those of AVX2: without, it gives a tenth of the tokens and says nothing."""
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split())
    if lacking := sorted(LLAMA_CPP_NEEDS - flags):
        raise CheckError(f"this processor has no {', '.join(lacking)}, which our llama.cpp is built with")
    import llama_cpp

    told = llama_cpp.llama_print_system_info().decode(errors="replace")
    if "AVX2 = 1" not in told:
        raise CheckError(f"llama.cpp was built without AVX2: {told.strip()}")
    return told.strip()


def code_objects(description: Description) -> str:
    """Every HIP library in the venv that the image will load has code for its gfx."""
    from radeon_stack.codeobjects.report import audit
    from radeon_stack.codeobjects.sources import folder

    site = Path(__import__("sysconfig").get_path("purelib"))
    others = re.compile(rf"libbitsandbytes_rocm(?!{description['rocm_short']}\.so)\d+\.so$")
    found = audit((file for file in folder(site) if not others.search(file.name)), description["gfx"])
    if found.missing:
        raise CheckError(f"no code for {description['gfx']} in {', '.join(found.missing[:5])}")
    return f"{len(found.files)} files with code for {description['gfx']}"


def kernels_compiled(description: Description) -> str:
    """Our kernels are there for the gfx; a run compiles those that the image's compiler could not.

    Where its triton was never looked into, that may be all of them.
    """
    from radeon_stack.kernels import shipped
    from radeon_stack.kernels.variants import variants

    found, wanted = shipped.count(), len(variants(description["gfx"]))
    if not found and description["triton"]:
        raise CheckError(f"none of {wanted} kernels is compiled for {description['gfx']}")
    return f"{found} of {wanted} compiled for {description['gfx']}"


def nf4_round_trip(description: Description) -> str:
    return numerics.nf4_round_trip(_device(description))


def nf4_gradient(description: Description) -> str:
    return numerics.nf4_gradient(_device(description))


def adamw8bit(description: Description) -> str:
    return numerics.adamw8bit_steps(_device(description))


def _device(description: Description) -> str:
    return "cuda" if description["on_gpu"] else "cpu"


def _trains(description: Description) -> bool:
    return "bitsandbytes" in description["imports"]


def _asks_llama_cpp(description: Description) -> bool:
    return "llama_cpp" in description["imports"] and platform.machine() == "x86_64"


def _rocm(description: Description) -> bool:
    return description["rocm"] is not None


def _meets(found: str | None, requirement: Any) -> bool:
    """Some ask for a build by its local name (2.13.0+cpu), most for a version."""
    names = (found, found.partition("+")[0]) if found else ()
    return any(requirement.specifier.contains(name, prereleases=True) for name in names)


def _is_there(module: str) -> bool:
    """Is a module's file there? It is not imported, nor its parents: some look for a GPU when they are."""
    first, *rest = module.split(".")
    spec = find_spec(first)
    if spec is None or not rest:
        return spec is not None
    places = [Path(place).joinpath(*rest) for place in spec.submodule_search_locations or ()]
    return any(place.is_dir() or place.with_suffix(".py").is_file() for place in places)


def _requirements() -> Iterator[tuple[Distribution, Any]]:
    from packaging.requirements import Requirement

    for dist in distributions():
        for text in dist.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                yield dist, requirement


CHECKS = (
    Check("base", "torch and triton are the base's own", base_untouched),
    Check("torch", "torch is the platform's, and a HIP build of the release", torch_build),
    Check("nvidia", "nothing of CUDA came along", no_nvidia),
    Check("triton", "exactly one triton, with AMD's backend", one_triton),
    Check("requirements", "every package's requirements are met", requirements_met),
    Check("imports", "what the kind promises is there", imports),
    Check("linked", "extension modules find the libraries they are linked with", linked),
    Check("bitsandbytes", "a release right on RDNA, with its native library", bitsandbytes_native, applies=_trains),
    Check("llama.cpp", "its products on the CPU are of AVX2", llama_cpp_vectors, applies=_asks_llama_cpp),
    Check("code objects", "every HIP library has code for the gfx", code_objects, applies=_rocm),
    Check("kernels", "our kernels are compiled ahead", kernels_compiled, applies=lambda d: bool(d.get("kernels"))),
    Check("nf4", "NF4 round trip within tolerance, block sizes 64 and 128", nf4_round_trip, applies=_trains),
    Check("nf4 gradient", "an NF4 layer gives its input the right gradient", nf4_gradient, applies=_trains),
    Check("adamw8bit", "steps of AdamW with 8-bit states", adamw8bit, applies=_trains),
    Check("nf4 gemv", "one-row NF4 product against the decoded weight", lambda _: numerics.nf4_gemv(), "gpu", _trains),
    Check("sdpa", "SDPA's flash kernel, forward and backward", lambda _: numerics.flash_attention(), "gpu", _trains),
    Check("gfx", "the GPU is the image's gfx", lambda d: numerics.gpu_is(d["gfx"]), "gpu", _rocm),
)
