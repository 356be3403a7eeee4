"""Error texts: each has a log in which it is found; causes come before what they cause; size does not matter."""

from __future__ import annotations

import io
import sys
import time
import tomllib
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from radeon_stack.catalog.load import read, resolve
from radeon_stack.errors import Exit, MachineError
from radeon_stack.host.known_issues import load_issues
from radeon_stack.host.machine import boot_id
from radeon_stack.host.signatures import PIECE, Signature, causes, diagnose, load_signatures
from radeon_stack.host.sysroot import Sysroot
from radeon_stack.launch.explaining import explained, refused, require_reboot, with_other_order
from radeon_stack.launch.launcher import draft, write_records
from radeon_stack.launch.plan import LaunchPlan
from radeon_stack.launch.supervise import carry_out, settle
from radeon_stack.runs.outcome import Outcome
from radeon_stack.runs.store import Diagnosis, Run, RunStore, State, Status
from tests.conftest import Cli
from tests.unit.test_launch import circumstances

LOGS = tomllib.loads((Path(__file__).parent / "logs.toml").read_text(encoding="utf-8"))
KNOWN = {signature.id: signature for signature in load_signatures()}

ROWS_OF_THE_CATALOGUE = 28
BOOT = "the boot of the run"


def excerpt(code: str) -> bytes:
    return str(LOGS[code]["log"]).encode()


def test_every_signature_has_a_log_with_its_source_and_every_log_a_signature() -> None:
    assert all(log["source"] == "files" or log["source"].startswith("https://github.com/") for log in LOGS.values())
    assert set(LOGS) == set(KNOWN) and len(KNOWN) >= ROWS_OF_THE_CATALOGUE


@pytest.mark.parametrize("code", KNOWN)
def test_a_signature_is_the_first_that_is_found_in_its_log(code: str) -> None:
    matches = diagnose(io.BytesIO(b"step 41\n" + excerpt(code) + b"\n"))
    assert matches[0].signature.id == code
    assert matches[0].line and matches[0].line in excerpt(code).decode()


@pytest.mark.parametrize(("code", "line"), [(code, line) for code, log in LOGS.items() for line in log.get("more", [])])
def test_the_other_words_of_an_error_are_known_too(code: str, line: str) -> None:
    assert diagnose(io.BytesIO(line.encode() + b"\n"))[0].signature.id == code


@pytest.mark.parametrize(
    "line",
    [
        "AttributeError: '_OpNamespace' 'fbgemm' object has no attribute 'quantize_fp8_per_row'",
        "The model is quantized with CompressedTensorsConfig but you are passing a TorchAoConfig config",
        "RuntimeError: Cannot set version_counter for inference tensor",
    ],
)
def test_whoever_failed_to_train_in_fp8_is_told_what_does(line: str) -> None:
    assert "run train-llama-fp8 " in diagnose(io.BytesIO(line.encode() + b"\n"))[0].signature.remedy


@pytest.mark.parametrize("code", KNOWN)
def test_no_other_cause_is_seen_in_it(code: str) -> None:
    """A disk and a shm that are full say the same words; the nearer one is first."""
    others = {match.signature.id for match in causes(diagnose(io.BytesIO(excerpt(code))))} - {code}
    assert others <= ({"RS-ER-031"} if code == "RS-ER-032" else set())


def test_an_ordinary_log_shows_nothing() -> None:
    log = b"".join(b"{'loss': %f, 'grad_norm': 1.2, 'epoch': %d}\r" % (1 / n, n) for n in range(1, 2000))
    assert diagnose(io.BytesIO(log + b"\nLoading checkpoint shards: 100%\nSaving model\n")) == []


def test_a_cause_comes_before_what_it_causes_wherever_it_stands() -> None:
    log = excerpt("RS-ER-013") + excerpt("RS-ER-014") + excerpt("RS-ER-008") + b"x\n" * 5000 + excerpt("RS-ER-001")
    found = [match.signature.id for match in diagnose(io.BytesIO(log))]
    assert found == ["RS-ER-001", "RS-ER-008", "RS-ER-014", "RS-ER-013"]
    assert [match.signature.id for match in causes(diagnose(io.BytesIO(log)))] == found[:-1]


@given(st.integers(0, 200), st.sampled_from(sorted(KNOWN)))
def test_a_text_across_two_pieces_is_found(before: int, code: str) -> None:
    text = excerpt(code)
    filler = b"." * 79 + b"\n"
    lead = filler * ((PIECE - before) // len(filler))
    lead += b"." * (PIECE - before - len(lead) - 1) + b"\n"
    matches = diagnose(io.BytesIO(lead + text + filler * 3))
    assert matches and matches[0].signature.id == code
    assert matches[0].offset >= len(lead)


def test_control_characters_of_a_log_reach_no_terminal() -> None:
    log = b"\x1b]0;owned\x07\x1b[31mMemory access fault by GPU node-1\x1b[0m on address 0x0\x9b2J\n"
    line = diagnose(io.BytesIO(log))[0].line
    assert "Memory access fault by GPU node-1" in line and not [c for c in line if ord(c) < 32 or 127 <= ord(c) < 160]


def test_a_line_without_an_end_is_shown_around_its_text() -> None:
    log = b"y" * 3_000_000 + b" HIP out of memory. Tried to allocate 2 GiB" + b"z" * 3_000_000
    match = diagnose(io.BytesIO(log))[0]
    assert "HIP out of memory" in match.line and len(match.line) <= 300


def test_a_hundred_megabytes_are_matched_in_seconds_and_little_memory(tmp_path: Path) -> None:
    """5 s are promised; the bound here is wider, since test machines are shared."""
    log = tmp_path / "long.log"
    line = b"{'loss': 0.1234, 'grad_norm': 1.25, 'learning_rate': 5e-05, 'epoch': 0.31}\n"
    log.write_bytes(line * (100_000_000 // len(line)) + excerpt("RS-ER-001"))
    tracemalloc.start()
    began = time.process_time()
    with log.open("rb") as stream:
        assert diagnose(stream)[0].signature.id == "RS-ER-001"
    seconds, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    assert seconds < 30


def test_a_flood_is_counted_and_does_not_take_longer() -> None:
    log = excerpt("RS-ER-026") * 200_000
    began = time.process_time()
    assert diagnose(io.BytesIO(log))[0].times > 100
    assert time.process_time() - began < 20


@pytest.mark.parametrize("signature", KNOWN.values(), ids=list(KNOWN))
def test_whatever_a_signature_refers_to_is_there(signature: Signature) -> None:
    from radeon_stack.host.checks import CHECKS

    text = f"{signature.cause} {signature.remedy}"
    known = {issue.id for issue in load_issues()} | {check.code for check in CHECKS}
    named = {word.strip("().,;:") for word in text.split() if word.strip("().,;:").startswith("RS")}
    assert named <= known


def test_diagnose_reads_files_and_streams_and_says_what_to_do(cli: Cli, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(excerpt("RS-ER-014"))
    told = cli("diagnose", log)
    assert told.code == Exit.CHECK and "RS-ER-014" in told.out and "train.batch_size=1" in told.out
    fault = cli("diagnose", "-", "--json", input=excerpt("RS-ER-001").decode())
    assert fault.code == Exit.CHECK and fault.json["matches"][0]["fault"] and "reboot" in fault.error
    log.write_text("all is well\n")
    assert cli("diagnose", log).code == Exit.OK
    assert cli("diagnose", tmp_path / "none").code == Exit.USAGE


def test_a_failed_run_ends_with_the_cause_that_its_log_shows(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log.write_bytes(excerpt("RS-ER-014"))
    before = Outcome(State.FAILED, Exit.WORKLOAD, "the workload ended with exit code 1 and said no reason")
    after = explained(before, run, boot=BOOT)
    assert after.what == "GPU memory is full" and after.diagnosis is not None and not after.diagnosis.boot
    assert "978.00 MiB" in after.diagnosis.evidence and "batch_size" in after.remedy
    run.log.write_text("nothing that we know\n")
    assert explained(before, run, boot=BOOT) == before
    assert explained(before, Run(tmp_path / "none"), boot=BOOT) == before


def test_after_a_gpu_fault_a_reboot_comes_first_and_then_another_order_of_the_data(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log.write_bytes(excerpt("RS-ER-001"))
    fault = explained(Outcome(State.FAILED, Exit.WORKLOAD), run, boot=boot_id(Sysroot()))
    assert fault.diagnosis is not None and fault.diagnosis.boot
    assert fault.remedy.endswith(f"radeon-stack run --resume {run.id}")
    status = Status(state=State.FAILED, recipe="train-llama", engine="local", started=0.0, diagnosis=fault.diagnosis)
    with pytest.raises(MachineError, match=r"GPU fault \(RS-ER-001\).*reboot"):
        require_reboot(status, anyway=False)
    require_reboot(status, anyway=True)
    later = status.model_copy(update={"diagnosis": Diagnosis("RS-ER-001", "", "", boot="of last week")})
    require_reboot(later, anyway=False)
    record = {"recipe": {"config": {"train": {"data_seed": 3407, "seed": 42}}}}
    assert with_other_order(record, later)["recipe"]["config"]["train"] == {"data_seed": 3408, "seed": 42}
    assert with_other_order(record, None) is record


CRASH = """
import ctypes
def _grouped_mm():
    ctypes.string_at(0)
_grouped_mm()
"""


def run_of(tmp_path: Path, *command: str) -> tuple[Run, LaunchPlan]:
    """A run of the demo whose workload is another command, with its records."""
    store = RunStore(tmp_path)
    effective = resolve(read("train-llama"), "demo")
    drafted = draft(effective, circumstances(image=None), store)
    write_records(drafted, store)
    return drafted.run, replace(drafted.plan, command=command)


def test_a_crash_in_native_code_is_told_by_the_function_that_it_happened_in(tmp_path: Path) -> None:
    """A real segmentation fault, which says nothing by itself: the plan has Python's fault handler speak."""
    run, plan = run_of(tmp_path, sys.executable, "-c", CRASH)
    outcome = carry_out(run, plan, lambda event: None, lambda text: None)
    assert outcome.exit_code == Exit.WORKLOAD and outcome.diagnosis is not None
    assert outcome.diagnosis.signature == "RS-ER-021" and "batched_mm" in outcome.remedy
    status = run.status()
    assert status is not None and status.diagnosis == outcome.diagnosis and status.boot == boot_id(Sysroot())
    assert "RS-ER-021" in run.report.read_text()


def test_a_resumed_run_is_diagnosed_by_its_own_part_of_the_log(tmp_path: Path) -> None:
    """The fault of an attempt before is told no more: it would ask for a reboot again and again."""
    run, plan = run_of(tmp_path, sys.executable, "-c", "raise SystemExit('something else')")
    run.log.write_bytes(excerpt("RS-ER-001"))
    outcome = carry_out(run, plan, lambda event: None, lambda text: None)
    assert outcome.exit_code == Exit.WORKLOAD and outcome.diagnosis is None
    assert "something else" in run.log.read_text()


def test_a_fault_that_took_the_machine_down_is_known_by_the_boot_before(tmp_path: Path) -> None:
    """Nobody was there when it ended, and the run is settled after the reboot: nothing keeps it from going on."""
    run, _ = run_of(tmp_path, "true")
    status = run.status()
    assert status is not None
    gone = {"pid": 1 << 22, "started": 1}
    before = {"state": State.RUNNING, "handle": gone, "boot": "the one before", "launcher": None}
    run.write_status(status.model_copy(update=before))
    run.log.write_bytes(excerpt("RS-ER-001"))
    outcome = settle(run)
    assert outcome.state is State.LOST and outcome.diagnosis is not None
    assert outcome.diagnosis.boot == "the one before"
    require_reboot(run.status(), anyway=False)


def test_what_an_engine_refuses_has_its_remedy_too(tmp_path: Path) -> None:
    run = Run(tmp_path / "20260101-000000-train-llama-aaaa")
    error = MachineError(f"the engine refused to start the container: {excerpt('RS-ER-007').decode().strip()}")
    outcome = refused(error, run)
    assert outcome.exit_code == Exit.MACHINE and "radeon-stack doctor" in outcome.remedy == error.remedy
    assert outcome.diagnosis is not None and outcome.diagnosis.signature == "RS-ER-007"
    assert refused(MachineError("something else", remedy="ours"), run).remedy == "ours"
    assert run.id in refused(MachineError(excerpt("RS-ER-031").decode().strip()), run).remedy
