"""Writes docs/*.md from the program's own tables and from what was audited: what is documented is what it has."""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernels_page
import scaling_page
import speed_page
import training_page

from radeon_stack.host.checks import CHECKS, Check
from radeon_stack.host.checks.cluster import CHECKS as CLUSTER_CHECKS
from radeon_stack.host.known_issues import Issue, load_issues
from radeon_stack.host.signatures import load_signatures
from radeon_stack.workloads.capabilities.questions import all_questions

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are as they should be")
    check = parser.parse_args().check
    for name, text in (
        ("doctor.md", doctor()),
        ("probe.md", probe()),
        ("kernels.md", kernels_page.page()),
        ("kernel-speed.md", speed_page.page()),
        ("training-speed.md", training_page.page()),
        ("scaling.md", scaling_page.page()),
    ):
        page = ROOT / "docs" / name
        if not check:
            page.write_text(text, encoding="utf-8")
        elif not page.is_file() or page.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{name} is old: make docs")
    return 0


def probe() -> str:
    """The probe's questions as Markdown, each with what the function that asks it says of itself."""
    lines = ["<!-- written by tools/docs.py; edit the code it reads -->", "# What `radeon-stack run probe` asks", ""]
    lines += ['Names and patterns go into `--set questions=\'["sdpa*", "all_reduce"]\'`.', ""]
    groups: dict[str, list[str]] = {}
    for question in all_questions():
        groups.setdefault(question.run, []).append(question.name)
    for run, names in groups.items():
        lines += [f"- {', '.join(f'`{name}`' for name in names)}", "", f"  {_docstring(run)}", ""]
    return "\n".join(lines)


def _docstring(run: str) -> str:
    """Of `module:function`, read without importing torch."""
    module, _, name = run.partition(":")
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return " ".join((ast.get_docstring(found) or "").split())


def doctor() -> str:
    """Checks, known issues and error texts as Markdown."""
    lines = ["<!-- written by tools/docs.py; edit the data it reads -->", "# What doctor looks at", ""]
    lines += ["`radeon-stack doctor` prints these codes; `-v` prints those too that are fine. Exit 3 on a failure.", ""]
    lines += _checks(CHECKS)
    lines += ["# What doctor looks at of a Slurm cluster", ""]
    lines += [
        "`radeon-stack doctor --engine slurm [--partition NAME]` asks these of the cluster and one of its nodes.",
        "",
    ]
    lines += _checks(CLUSTER_CHECKS)
    lines += ["# Known issues", ""]
    lines += ["A run sets the variables by itself, and says so in `explain`; `--without ID` leaves them out.", ""]
    for issue in load_issues():
        lines += _issue(issue)
    lines += ["# Error texts", "", "`radeon-stack diagnose LOG` finds these; a failed run ends with the nearest.", ""]
    for signature in load_signatures():
        lines += [f'## <a id="{signature.id.lower()}"></a>{signature.id}: {signature.title}', ""]
        lines += [*(f"    {text}" for text in signature.contains), "", f"{signature.cause}. **{signature.remedy}**", ""]
        lines += [f"See {', '.join(signature.links)}", ""]
    return "\n".join(lines)


def _checks(checks: Sequence[Check[Any]]) -> list[str]:
    lines = []
    for check in checks:
        lines += [f'## <a id="{check.code.lower()}"></a>{check.code}: {check.title}', ""]
        lines += [inspect.getdoc(check.evaluate) or "", ""]
    return lines


def _issue(issue: Issue) -> list[str]:
    met = [("gfx", ", ".join(issue.gfx)), ("ROCm", issue.rocm), ("kernel", issue.kernel)]
    met += list(issue.components.items())
    where = "; ".join(f"{name} {wanted}" for name, wanted in met if wanted) or "all"
    more = f"; {issue.least_gpus} GPUs and more" if issue.least_gpus > 1 else ""
    more += f"; {issue.least_nodes} nodes and more" if issue.least_nodes > 1 else ""
    lines = [f'## <a id="{issue.id.lower()}"></a>{issue.id}: {issue.title}', "", f"Met by: {where}{more}. ", ""]
    lines += [f"{issue.symptom}. Then: {issue.consequence}.", ""]
    if issue.env:
        lines += ["    " + " ".join(f"{name}={value}" for name, value in issue.env.items()), ""]
    lines += [f"{text}.\n" for text in (issue.setting, issue.handled) if text]
    fixed = f"Fixed in {issue.fixed_in}. " if issue.fixed_in else ""
    return [*lines, f"{fixed}See {', '.join(issue.links)} (read {issue.checked}).", ""]


if __name__ == "__main__":
    sys.exit(main())
